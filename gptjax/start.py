"""What every binary does first: its devices and its caches."""

from pathlib import Path

from absl import flags, logging

CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices', 0, 'virtual CPU devices to run on; 0: the devices of the machine', lower_bound=0)
CACHE_DIR = flags.DEFINE_string('cache_dir', '~/.cache/gptjax', 'folder of prepared data and compiled programs')


def start() -> Path:
  """Sets JAX up before its backend starts; returns the cache folder."""
  logging.set_verbosity(logging.FATAL)  # what libraries log of a failure, they also raise
  cache = Path(CACHE_DIR.value).expanduser()
  import jax  # only now: --help and mistakes in flags should not wait for it
  if CPU_DEVICES.value:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', CPU_DEVICES.value)
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  return cache
