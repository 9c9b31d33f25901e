"""The core's nouns as bytes: generated protobuf stubs and the codec between them and the core's dataclasses."""
