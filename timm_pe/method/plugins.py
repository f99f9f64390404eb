"""The registry of projectors and losses, those of other packages too, which are found through their entry points.

A package registers as this one does, with `@register_projector` and `@register_feature_loss`, and names the modules that do
so under the group `timm_pe.plugins`:

    [project.entry-points."timm_pe.plugins"]
    my_projectors = "my_projectors"

They are imported when an unknown name is looked up and when all names are listed: a run that uses none of them never
imports them.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..errors import UsageError

_logger = logging.getLogger(__name__)

F = TypeVar('F', bound=Callable[..., Any])

GROUP = 'timm_pe.plugins'


@functools.cache
def load_plugins() -> None:
    """Import each installed plugin, once per process. A broken one gives a warning that names its package."""
    for plugin in sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name):
        try:
            plugin.load()
        except (Exception, SystemExit) as e:
            package = f'{plugin.dist.name} {plugin.dist.version}' if plugin.dist else 'an unknown package'
            reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
            _logger.warning(f"Plugin '{plugin.name}' of {package} is broken and left out ({reason}).")


class Registry:
    """What is registered under names. Its names are sorted, for argparse and messages; plugins are loaded only when needed.

    Args:
        what: What is registered, for messages: 'projector'.
        *own: Names of this package, known before the module that registers them is imported.

    Attributes:
        factories: What is registered under each name.
    """

    def __init__(self, what: str, *own: str):
        self.what, self.own = what, own
        self.factories: dict[str, Callable[..., Any]] = {}

    def __contains__(self, name: object) -> bool:
        if name not in self._known():
            load_plugins()
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._known()))

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: make a function or class known under `name`.

        Raises:
            ValueError: The name is taken.
        """

        def decorate(factory: F) -> F:
            if name in self.factories:
                raise ValueError(
                    f"{self.what} '{name}' is registered already ({self.factories[name]}): choose another name"
                )
            self.factories[name] = factory
            return factory

        return decorate

    def get(self, name: str) -> Callable[..., Any]:
        """What is registered under `name`.

        Raises:
            UsageError: Unknown name; the message lists the known ones.
        """
        if name not in self:
            raise UsageError(f"unknown {self.what} '{name}': choose from {', '.join(self)}")
        return self.factories[name]

    def _known(self) -> set[str]:
        return {*self.own, *self.factories}
