"""What of a model depends on its modules only: looked up once, and again when a module was exchanged.

A walk over all modules costs a millisecond at 24 layers, and a step would make several. Checking that every
module still has the children and the configuration that it had costs some 30 us.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any

from torch import nn

from softprompt.engine import model_records

_RANDOM = ("drop", "jitter")  # dropout, layerdrop, drop_path; router noise


class Structure:
    """The modules below `root` as they were, and where among them the things are that the engine asks for.

    Keeps no module alive: a hook of a module may hold the whole model, and this is kept by model. Fields
    hold numbers of modules, in the order of `root.modules()`.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        number = {id(module): place for place, module in enumerate(modules)}
        self._modules = [weakref.ref(module) for module in modules]
        # `_modules` of a module may hold None; the last place stands for it.
        self._children = [
            number.get(id(child), len(modules)) for module in modules for child in module._modules.values()
        ]
        # Modules without this attribute have no such switch, unless their code gets another class.
        self.checkpointing = [i for i, m in enumerate(modules) if hasattr(m, "gradient_checkpointing")]
        self._configs = [
            (i, config)
            for i, module in enumerate(modules)
            if hasattr(config := getattr(module, "config", None), "to_dict")
        ]
        self.configs: list[Any] = list({id(config): config for _, config in self._configs}.values())
        self.dropouts = [i for i, module in enumerate(modules) if isinstance(module, nn.Dropout)]
        # Attention functions are handed a number that the module keeps.
        self.random_settings = [
            (i, name)
            for i, module in enumerate(modules)
            for name in vars(module)
            if any(part in name for part in _RANDOM)
        ]

    def modules(self) -> list[nn.Module] | None:
        """The modules, or None where one was exchanged, added or removed, or has another configuration."""
        modules: list[Any] = [reference() for reference in self._modules]
        if any(module is None for module in modules):
            return None
        children = [child for module in modules for child in module._modules.values()]
        if len(children) != len(self._children):
            return None
        modules.append(None)
        if not all(map(operator.is_, children, map(modules.__getitem__, self._children))):
            return None
        for place, config in self._configs:
            if getattr(modules[place], "config", None) is not config:
                return None
        del modules[-1]
        return modules


def structure_of(root: nn.Module) -> tuple[Structure, list[nn.Module]]:
    """The structure of a model or a part of it, as it is now, and its modules."""
    known = model_records.last(root, "structure")
    modules = None if known is None else known[1].modules()
    if known is None or modules is None:
        return model_records.put(root, "structure", None, Structure(root)), list(root.modules())
    return known[1], modules
