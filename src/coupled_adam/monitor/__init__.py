"""What becomes of an embedding matrix while it is trained: how it looks, and which cause moves its mean."""

from coupled_adam.monitor.drift import Drift, DriftMonitor, drift
from coupled_adam.monitor.health import health

__all__ = ["Drift", "DriftMonitor", "drift", "health"]
