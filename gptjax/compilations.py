"""How many programs a process compiles."""

import jax


class CompileCounter:
  """Counts the programs that XLA compiles or loads from the persistent cache, until `close`."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
    self.count += event == '/jax/core/compile/backend_compile_duration'

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._count)
