"""ONNX files and their checks. ONNX Runtime, which only this room imports, is kept from reporting its use."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is loaded
