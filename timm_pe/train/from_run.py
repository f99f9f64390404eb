"""Settings taken from another run's folder: how its student was built and fed, for an evaluation or for a teacher."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from timm.data.model_config import resolve_input_data_config
from timm.models import resolve_model_input_args
from timm.utils import unwrap_model

from ..config.declare import default_of, name_of
from ..config.rules import odd_value, out_of_bounds
from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher, values_of
from ..config.yaml_file import runs_code, typed_value
from ..errors import UsageError, one_line
from ..method.teacher import Teacher
from ..run_folder import RunFolder

_logger = logging.getLogger(__name__)

# flags that say how a run's student was built and fed: those that a teacher takes, ...
_OF_A_TEACHER = ('model', 'model_kwargs', 'pretrained_cfg_overlay', 'in_chans', 'gp', 'bn_eps', 'img_size', 'input_size', 'mean', 'std')  # fmt: skip
# flags that define the input of the run's validation
_OF_ITS_INPUT = ('img_size', 'input_size', 'crop_pct', 'interpolation')
# ... and those that an evaluation takes, to compute what the run's own validation did. Flags in one tuple belong
# together: none of them is taken if one is given
_OF_AN_EVALUATION = (
    *((name,) for name in ('model', 'model_kwargs', 'pretrained_cfg_overlay', 'num_classes', 'in_chans', 'gp', 'bn_eps')),
    ('img_size', 'input_size'),
    *((name,) for name in ('mean', 'std', 'crop_pct', 'interpolation', 'input_img_mode', 'val_split', 'class_map', 'class_depth')),
    ('data', 'data_dir', 'dataset', 'val_num_samples', 'input_key', 'target_key'),
    ('amp', 'amp_dtype', 'model_dtype'),
    ('fast_norm',),
    ('no_prefetcher',),  # the prefetcher normalizes in --model-dtype
    ('naflex_loader', 'naflex_max_seq_len', 'naflex_patchify_channels_first'),
    *((name,) for name in ('task', 'target_format', 'multilabel_threshold', 'tta', 'model_ema_force_cpu')),
)  # fmt: skip
# fields of a pretrained cfg about the model's input
_INPUT_FIELDS = ('mean', 'std', 'input_size', 'interpolation', 'crop_pct', 'crop_mode')


def read_settings(folder: RunFolder, what: str, names: Iterable[str]) -> dict[str, Any]:
    """Settings of a finished run, each checked as on the command line.

    Args:
        folder: Its folder.
        what: The flag that names the folder ('--teacher-checkpoint'), for messages.
        names: Flags to read.

    Returns:
        Their values, None if the run does not have them.

    Raises:
        UsageError: A value is not valid for its flag.
    """
    path = folder.args_file

    def refuse(message: str) -> NoReturn:
        raise UsageError(message)

    try:
        run = folder.args()
    except ValueError as e:
        raise UsageError(f'{what}: {e}') from e
    if not run:
        raise UsageError(f"{what}: '{path}' is empty, it should say how the student was built and fed")
    settings: dict[str, Any] = dict.fromkeys(names)
    for name in settings:
        value = run.get(name)
        if value is None:
            continue
        if runs_code(name, value):
            refuse(f"{what}: {name} in '{path}' runs code and is taken from the command line alone")
        settings[name] = typed_value(RunConfig, name, value, f"{what}: {name} in '{path}'", refuse)
        odd = odd_value(settings[name]) or out_of_bounds(RunConfig, name, settings[name])
        if odd:
            refuse(f"{what}: {name} in '{path}' {odd}")
    if settings.get('input_size') and settings.get('in_chans', 0) is None:
        settings['in_chans'] = settings['input_size'][0]
    return settings


# An evaluation ---------------------------------------------------------------------------------------------------------


def fill_evaluation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an evaluation takes from the run of its checkpoint; none without --evaluate.

    Args:
        given: Settings of the command line and YAML.

    Raises:
        UsageError: See `read_settings`.
    """
    folder = RunFolder.around(given.get('evaluate'))
    if folder is None:
        return {}
    if not RunConfig(**read_settings(folder, '--evaluate', ('data', 'data_dir', 'dataset', 'unlabeled'))).has_labels:
        raise UsageError(
            f"--evaluate: the run '{folder.path}' had no labels and its student has no classifier to evaluate: fine-tune "
            f'it (--pretrained-path {folder.path}), its own measures are in summary.csv'
        )
    return _of_an_evaluation(folder, given)


def _of_an_evaluation(folder: RunFolder, given: Collection[str]) -> dict[str, Any]:
    run = read_settings(folder, '--evaluate', [name for names in _OF_AN_EVALUATION for name in names])
    taken = [name for names in _OF_AN_EVALUATION if not set(names) & set(given) for name in names]
    return {name: run[name] for name in taken if run[name] is not None}


def describe_evaluation(config: RunConfig) -> str:
    """A message on which settings of --evaluate are those of its run and which differ from it; '' without a run."""
    folder = RunFolder.around(config.evaluate)
    if folder is None:
        return ''
    run = {k: v for k, v in _of_an_evaluation(folder, ()).items() if v != default_of(RunConfig, k)}
    same = [f'{name} {_shown(value)}' for name, value in run.items() if getattr(config, name) == value]
    other = [f'{name} {_shown(value)}' for name, value in run.items() if getattr(config, name) != value]
    otherwise = f'; given otherwise: {", ".join(other)}' if other else ''
    return f"--evaluate: from '{folder.args_file}': {', '.join(same) or 'nothing'}{otherwise}."


def warn_of_other_normalization(config: RunConfig, mean: Sequence[float], std: Sequence[float]) -> None:
    """Say where a student starts from a run that was told another normalization of its images than this one has.

    Args:
        config: Run settings.
        mean: The mean of this run's images, by channel.
        std: Their standard deviation.
    """
    for flag in ('pretrained_path', 'initial_checkpoint'):
        folder = RunFolder.around(getattr(config, flag))
        if folder is None:
            continue
        try:
            run = read_settings(folder, name_of(flag), ('mean', 'std'))
        except UsageError:  # its weights can be read all the same
            continue
        for name, value in (('mean', mean), ('std', std)):
            then = run[name] and (list(run[name]) * len(value) if len(run[name]) == 1 else list(run[name]))
            if then and then != list(value):
                _logger.warning(
                    f"{name_of(flag)}: '{folder.path}' was trained with --{name} {_shown(run[name])}, this run has "
                    f'{_shown(list(value))}: give it the same to keep what the weights are used to.'
                )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ' '.join(f'{k}={v}' for k, v in value.items())
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


# A teacher -------------------------------------------------------------------------------------------------------------


def check_teacher_run(flags: OneTeacher, input_img_mode: str | None = None) -> None:
    """Refuse a teacher's run folder whose settings cannot be read, before anything is built.

    Args:
        flags: The teacher.
        input_img_mode: That of the run that it teaches.

    Raises:
        UsageError: See `read_settings`; or it was trained on images of another PIL mode, of which only grey ones are
            converted.
    """
    folder = RunFolder.around(flags.checkpoint)
    if folder is None:
        return
    settings = read_settings(folder, '--teacher-checkpoint', (*_OF_A_TEACHER, 'input_img_mode'))
    trained, mode = settings['model'], settings['input_img_mode']
    if mode != input_img_mode and {mode, input_img_mode} - {None, 'L', 'RGB'}:
        raise UsageError(
            f"--teacher-checkpoint: the run in '{folder.path}' was trained with --input-img-mode {mode or 'RGB'}, this one has "
            f'{input_img_mode or "RGB"}: give both the same'
        )
    if trained and ':' not in f'{trained}{flags.name}' and trained.split('.')[0] != flags.name.split('.')[0]:
        raise UsageError(
            f"--teacher {flags.name}: the run in '{folder.path}' has trained {trained}: leave --teacher out, it is taken from "
            f'there'
        )


def fill_teacher(given: Mapping[str, Any]) -> dict[str, Any]:
    """The names of teachers that are not given, each from the run folder that gives its weights.

    Args:
        given: Settings of the command line and YAML.

    Raises:
        UsageError: See `read_settings`.
    """
    names, checkpoints = given.get('teacher'), given.get('teacher_checkpoint')
    several = next((v for v in (names, checkpoints) if isinstance(v, list)), [None])
    wanted = values_of('teacher', names, len(several))
    found = [
        name or (_model_of(path) if path else None)
        for name, path in zip(wanted, values_of('teacher_checkpoint', checkpoints, len(several)), strict=False)
    ]
    if found == wanted or len(found) < len(wanted):  # another number of values is refused later
        return {}
    return {'teacher': found if len(found) > 1 else found[0]}


def _model_of(path: str) -> str | None:
    folder = RunFolder.around(path)
    model: str | None = read_settings(folder, '--teacher-checkpoint', ['model'])['model'] if folder else None
    return model


def teacher_input(flags: OneTeacher, teacher: Teacher) -> dict[str, Any] | None:
    """timm's data config of the images that the teacher was itself validated on; None if unknown."""
    network = unwrap_model(teacher.model)
    folder = RunFolder.around(flags.checkpoint)
    if not getattr(network, 'pretrained_cfg', None) or (folder is None and (flags.checkpoint or not flags.pretrained)):
        return None
    run = {} if folder is None else read_settings(folder, '--teacher-checkpoint', _OF_ITS_INPUT)
    return resolve_input_data_config(network, args={name: value for name, value in run.items() if value is not None})


def teacher_settings(flags: OneTeacher) -> OneTeacher:
    """The settings of a teacher, with those of the run that trained it: how it is built, mean and std.

    Raises:
        UsageError: See `read_settings`; or that run's model cannot be looked up.
    """
    folder = RunFolder.around(flags.checkpoint)
    if folder is None:
        return flags
    run = read_settings(folder, '--teacher-checkpoint', _OF_A_TEACHER)
    built = _built_in(run, run['model'] or flags.name)
    kwargs = {
        **(run['model_kwargs'] or {}),
        'in_chans': run['in_chans'],
        'global_pool': run['gp'],
        'bn_eps': run['bn_eps'],
        # an architecture with a fixed input size was built for that of its images
        'img_size': built.get('img_size'),
        # input fields from that run's model name and overlay; the name of the teacher may have another tag
        'pretrained_cfg_overlay': {k: v for k, v in built['pretrained_cfg'].items() if k in _INPUT_FIELDS},
    }
    kwargs = {**{k: v for k, v in kwargs.items() if v is not None}, **flags.kwargs}
    return replace(flags, mean=flags.mean or run['mean'], std=flags.std or run['std'], kwargs=kwargs)


def _built_in(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments that timm built the student of a `run` with, including `pretrained_cfg` and `img_size`."""
    given = {key: run[key] for key in ('img_size', 'input_size', 'in_chans')}
    overlay = {'pretrained_cfg_overlay': run['pretrained_cfg_overlay']} if run['pretrained_cfg_overlay'] else {}
    try:
        return resolve_model_input_args(name, given, **{**(run['model_kwargs'] or {}), **overlay})
    except Exception as e:  # the config.json of a hub or local-dir model may be anything, or gone
        raise UsageError(
            f"--teacher-checkpoint: cannot tell how '{name}' was built and fed in its run ({one_line(e)}): give a weights file "
            f'outside of the run, --teacher-mean and --teacher-std'
        ) from e
