"""Projectors and losses from other packages, found through their entry points.

A package registers as this one does, with `@register_projector` and `@register_feature_loss`, and names the modules that do
so under the group `timm_pe.plugins`:

    [project.entry-points."timm_pe.plugins"]
    my_projectors = "my_projectors"

They are imported when an unknown name is looked up and when all names are listed: a run that uses none of them never
imports them.
"""

import functools
import logging
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

_logger = logging.getLogger(__name__)

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


class Names:
    """The names of a registry, sorted, for argparse and error messages: plugins are loaded only when needed.

    Args:
        *own: Names of this package, known before the module that registers them is imported.

    Attributes:
        registry: What is registered under each name.
    """

    def __init__(self, *own: str):
        self.own = own
        self.registry: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        if name not in self._known():
            load_plugins()
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._known()))

    def _known(self) -> set[str]:
        return {*self.own, *self.registry}
