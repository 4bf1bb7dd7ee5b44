"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# No test judges by the clock: a busy machine is slow to make examples, and that is no fault of theirs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
