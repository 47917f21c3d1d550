"""What fields of several configs have to be."""

from gptjax.config.errors import UserError


def at_least(prefix: str, config: object, lowest: float, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if value < lowest:
      raise UserError(f'{prefix}{name}', value, f'{lowest} or more')


def fraction(prefix: str, config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if not 0 <= value < 1:
      raise UserError(f'{prefix}{name}', value, 'at least 0 and below 1')


def divisors(n: int) -> str:
  return ', '.join(str(d) for d in range(1, n + 1) if n % d == 0)
