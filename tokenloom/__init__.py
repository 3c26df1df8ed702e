"""Tokenloom: a Kubernetes-native inference mesh for large language models."""

__version__ = "0.1.0"
