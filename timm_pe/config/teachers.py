"""One or several teachers: the settings of each, from flags that hold one value for all or one for each."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .declare import NOT_GIVEN, Words, annotations_of, declared_in, default_of, is_each, name_of, value_type
from .flags import TeacherFlags

_PREFIX = 'teacher_'
# one of these is in a data folder
_SPLITS = ('train', 'Train', 'training', 'val', 'Val', 'validation', 'test')


@dataclass(frozen=True, kw_only=True)
class OneTeacher:
    """The settings of one teacher, each that of the flag `--teacher-...` of its name (see `TeacherFlags`).

    Attributes:
        name: --teacher.
        title: What messages call it: 'Teacher', of several 'Teacher 2 (resnet34)'.
    """

    name: str
    title: str
    checkpoint: str | None
    num_classes: int | None
    input_size: int | None
    mean: list[float] | None
    std: list[float] | None
    dtype: str | None
    kwargs: dict[str, Any]
    tap: str | None
    pretrained: bool
    ema: bool
    fold: bool

    @property
    def is_random(self) -> bool:
        """Whether nothing is loaded into it."""
        return not self.pretrained and not self.checkpoint


def as_each(value: Any) -> list[Any]:
    """The values of several teachers, or that of a single one, of a flag whose one value is no list."""
    return value if isinstance(value, list) else [value]


def each_flags() -> list[str]:
    """Flags that may have one value for each teacher."""
    return [name for name, declared in declared_in(TeacherFlags).items() if declared.each]


def values_of(name: str, value: Any, number: int) -> list[Any]:
    """The values of a flag for each of `number` teachers; a list of another length as it is."""
    if not is_each(value, value_type(annotations_of(TeacherFlags)[name])[1]):
        return [value] * number
    default = default_of(TeacherFlags, name)
    return [default if v is None else v for v in value]


def teachers_of(flags: TeacherFlags) -> list[OneTeacher]:
    """The settings of each teacher; none without --teacher."""
    if not flags.teacher:
        return []
    number = len(flags.teacher) if isinstance(flags.teacher, list) else 1
    columns = {
        name.removeprefix(_PREFIX): values_of(name, getattr(flags, name), number)
        for name in each_flags()
        if name != 'teacher'
    }
    names = values_of('teacher', flags.teacher, number)
    return [
        OneTeacher(
            name=names[i],
            title=f'Teacher {i + 1} ({names[i]})' if number > 1 else 'Teacher',
            pretrained=flags.teacher_pretrained,
            ema=flags.teacher_ema,
            fold=flags.teacher_fold,
            **{name: values[i] for name, values in columns.items()},
        )
        for i in range(number)
    ]


def read_words(given: dict[str, Any], known: Mapping[str, Any], refuse: Callable[[str], NoReturn]) -> None:
    """Convert what the command line gives to flags that may have one value for each teacher, in place.

    A flag takes all words that follow it. `--teacher NAME DATA` has always named the data folder after the teacher, so
    where none is given, a last word that can be nothing else is that folder.

    Args:
        given: Flags of the command line.
        known: Those of YAML.
        refuse: Reports an error and does not return.
    """
    names = [name for name in each_flags() if isinstance(given.get(name), Words)]
    has_data = any(given.get(n) or known.get(n) for n in ('data', 'data_dir'))
    for name in names:
        words = given[name]
        if len(words) > 1 and not has_data and _is_data(name, words[-1], 'dataset' in {**known, **given}):
            given['data'], has_data = words.pop(), True
        kind, found = value_type(annotations_of(TeacherFlags)[name])[0], []
        for word in words:
            try:
                found.append(None if word == NOT_GIVEN else kind(word))
            except ValueError:
                refuse(f'argument {name_of(name)}: invalid {kind.__name__} value: {word!r}')
        given[name] = found if len(found) > 1 else found[0]
        if found == [None]:
            del given[name]
            if name == 'teacher' and not {**known, **given}.get('teacher_checkpoint'):
                refuse("--teacher: '-' names no teacher, it stands for one whose run folder is in --teacher-checkpoint")


def _is_data(name: str, word: str, has_data_set: bool) -> bool:
    """Whether the last word of several is the data folder: a path that is no weights, or a folder with splits."""
    if os.path.isdir(word):
        is_run = os.path.exists(os.path.join(word, 'args.yaml'))
        is_path = os.sep in word or word.startswith(('.', '~'))
        has_splits = any(os.path.isdir(os.path.join(word, split)) for split in _SPLITS)
        return not is_run and (is_path or (has_splits and not has_data_set))
    if word.endswith('.tar') and not word.endswith('.pth.tar'):
        return True
    return name != 'teacher_checkpoint' and word.startswith((os.sep, '.', '~'))  # a folder that is not there


def check_each(flags: TeacherFlags, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse flags with another number of values than there are teachers.

    Args:
        flags: The settings.
        refuse: Reports the error and does not return.
    """
    number = len(flags.teacher) if isinstance(flags.teacher, list) else 1
    teachers = f'{number} teachers' if number > 1 else 'one teacher'
    if number > 1 and not all(flags.teacher or ()):
        refuse('--teacher: one of several has no name, nor a run folder in --teacher-checkpoint that tells it')
    if number > 1 and isinstance(flags.teacher_checkpoint, str):
        refuse(f"--teacher-checkpoint: give one for each of {teachers}, '-' for one without")
    for name in each_flags():
        found = len(values_of(name, getattr(flags, name), number))
        if found != number:
            refuse(f'{name_of(name)} has {found} values for {teachers}: give one for all, or one for each')
    if flags.teacher_weights is not None and len(flags.teacher_weights) != number:
        refuse(f'--teacher-weights has {len(flags.teacher_weights)} values for {teachers}: give one for each')
    for name in ('teacher_weights', 'teacher_drop'):
        if getattr(flags, name) and number == 1:
            refuse(f'{name_of(name)} is about several teachers, and there is one: leave it out')


def split_teachers(config: Mapping[str, Any], what: str, refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    """The keys of a YAML file, where `teacher` may be a list of mappings, with a list of values for each setting.

    Args:
        config: Keys and values as YAML has them: `teacher: [{name: resnet34, checkpoint: FILE, weight: 2}, resnet50]`.
        what: Names the key and its file, for messages.
        refuse: Reports the error and does not return.
    """
    given = config.get('teacher')
    entries = given if isinstance(given, list) else [given]
    if not any(isinstance(entry, dict) for entry in entries):
        return dict(config)
    known = ['name', 'weight', *(n.removeprefix(_PREFIX) for n in each_flags() if n != 'teacher')]
    rows = []
    for entry in entries:
        row = {str(k).replace('-', '_'): v for k, v in entry.items()} if isinstance(entry, dict) else {'name': entry}
        unknown = [key for key in row if key not in known]
        if unknown:
            refuse(f"{what}: a teacher has {', '.join(known)}, got '{unknown[0]}'")
        rows.append({key: None if value == NOT_GIVEN else value for key, value in row.items()})
    names = [row.get('name') for row in rows]
    found: dict[str, Any] = {'teacher': names} if any(names) else {}
    for key in known[1:]:
        if any(key in row for row in rows):
            found['teacher_weights' if key == 'weight' else _PREFIX + key] = [row.get(key) for row in rows]
    if None in found.get('teacher_weights', ()):
        refuse(f'{what}: give a weight to each teacher, or to none')
    config = {key: value for key, value in config.items() if key != 'teacher'}
    twice = [key for key in config if str(key).replace('-', '_') in found]
    if twice:
        refuse(f'{what}: {twice[0]} is given there and by itself: give it once')
    return {**config, **found}
