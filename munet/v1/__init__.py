"""The contract, generated from proto/munet/v1 by `make proto`. Do not edit."""
