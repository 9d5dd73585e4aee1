"""The front door: gRPC at the edge, converters as the only place where protos meet the domain."""
