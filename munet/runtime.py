"""ONNX Runtime, for whoever runs models: it reports to nobody.

From 1.29 on, the packages of its makers send them what process runs on what machine and which models it loads, unless
`ORT_DISABLE_TELEMETRY` is set before they are loaded. Here it is, unless a user has set it otherwise.

Source: Privacy.md of the package, "Disabling Telemetry".
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # after what it reads when it is loaded

__all__ = ["onnxruntime"]
