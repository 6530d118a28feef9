"""Which of the teacher's classes is which of the student's."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence


class ClassMap:
    """The teacher's class for each class of the student, by name.

    Args:
        student: the student's class names, in the order of its head.
        teacher: the teacher's.
        names: where one class has two names: the student's name to the teacher's.

    Raises:
        ValueError: if a name in ``names`` is unknown, or the two have no class in common.
    """

    def __init__(
        self, student: Sequence[str], teacher: Sequence[str], names: dict[str, str] | None = None
    ) -> None:
        names = names or {}
        for given, known, who in (
            (names, student, 'student'),
            (names.values(), teacher, 'teacher'),
        ):
            for name in given:
                if name not in known:
                    near = list(spelled_alike([name], known).values())
                    near = near or difflib.get_close_matches(str(name), list(known), 3, 0)
                    raise ValueError(
                        f'distillation.classes.names: the {who} has no class {name!r}; near ones: '
                        + ', '.join(near)
                    )
        self.student, self.teacher = list(student), list(teacher)
        positions = {name: i for i, name in enumerate(self.teacher)}
        self.indices = [positions.get(names.get(name, name)) for name in self.student]
        joined = {names.get(name, name) for name in self.student}
        alike = spelled_alike(self.unknown, [n for n in self.teacher if n not in joined])
        if alike:
            raise ValueError(
                f'of the student ({first_names(self.student)}) and the teacher '
                f'({first_names(self.teacher)}) {len(alike)} classes differ in spelling alone, so '
                f'the teacher would not know them: {did_you_mean(alike)} Write '
                f'distillation.classes=dict(names={alike!r}), or one spelling in both configs'
            )
        if all(index is None for index in self.indices):
            raise ValueError(
                f'student ({first_names(self.student)}) and teacher '
                f'({first_names(self.teacher)}) have no class '
                "in common: name those that are the same, distillation.classes.names={'mine': "
                "'theirs'}, take another teacher, or turn off rcnn_cls and rcnn_bbox by their "
                'loss_weight=0 (and start=None)'
            )

    @property
    def same(self) -> bool:
        """Whether both have the same classes in the same order."""
        return self.indices == list(range(len(self.teacher)))

    @property
    def unknown(self) -> list[str]:
        """The student's classes that the teacher does not know."""
        return [n for n, index in zip(self.student, self.indices, strict=True) if index is None]

    @property
    def twice(self) -> str:
        """What is wrong where two of the student's classes are one of the teacher's; '' if none."""
        known = [i for i in self.indices if i is not None]
        both = [i for i in known if known.count(i) > 1]
        if not both:
            return ''
        own = [n for n, i in zip(self.student, self.indices, strict=True) if i == both[0]]
        return (
            f"the student's classes {first_names(own)} are all the teacher's "
            f'{self.teacher[both[0]]!r} (distillation.classes.names), so it is ambiguous which of '
            'them a detection is: let one of them have it'
        )

    def __str__(self) -> str:
        known = len(self.student) - len(self.unknown)
        text = f"{known} of the student's {len(self.student)} classes are among the teacher's "
        text += f"{len(self.teacher)}; the teacher's other {len(self.teacher) - known} count as "
        text += 'background'
        return text + (f'; it does not know {first_names(self.unknown)}' if self.unknown else '')


def first_names(names: Sequence[str]) -> str:
    """The first four names, for a message."""
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def spelled_alike(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The name in ``known`` that differs from one of ``names`` by its spelling alone.

    That is by case, accents, spaces, hyphens and underscores. Where several do, none is meant.
    """
    folded: dict[str, list[str]] = {}
    for each in known:
        folded.setdefault(fold(each), []).append(each)
    found = {name: folded.get(fold(name), []) for name in dict.fromkeys(names)}
    return {name: alike[0] for name, alike in found.items() if len(alike) == 1 and name != alike[0]}


def did_you_mean(alike: dict[str, str]) -> str:
    """A question for a message: the first of the names that differ in spelling alone."""
    first = [f'{name!r}: did you mean {other!r}?' for name, other in list(alike.items())[:3]]
    return ' '.join(first)


def fold(name: object) -> str:
    """A name without case, accents, spaces, hyphens, underscores and invisible characters."""
    kept = unicodedata.normalize('NFKD', str(name)).casefold()
    # Combining classes from 200 on are accents; those below are letters' parts, as in Japanese.
    return ''.join(
        c for c in kept if unicodedata.combining(c) < 200 and unicodedata.category(c) not in _LOOSE
    )


_LOOSE = {'Zs', 'Zl', 'Zp', 'Cc', 'Cf', 'Pc', 'Pd'}
"""Unicode categories of spaces, invisible characters, underscores and hyphens."""
