"""What a recipe says, before anything is built."""

from __future__ import annotations


def terms(distillation: dict) -> list[str]:
    """Names of the entries that are terms: losses by their ``type``."""
    return [k for k, v in distillation.items() if isinstance(v, dict) and 'type' in v]


def terms_on(distillation: dict) -> list[str]:
    """Names of the terms whose weight is not the constant 0. Equation (2) weights a soft term with
    1 - hard_weight where no weight is given."""
    on = []
    for name in terms(distillation):
        term = distillation[name]
        default = 1 - term['hard_weight'] if 'hard_weight' in term else 1
        weight = term.get('loss_weight', default)
        if isinstance(weight, dict) or weight is None or weight != 0:
            on.append(name)
    return on
