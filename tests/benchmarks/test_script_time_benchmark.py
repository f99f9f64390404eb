import json

import pytest

SMALL = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--images', '120', '--batch-size', '8', '--pairs', '2']


@pytest.fixture(scope='module')
def script_time(load_script):
    return load_script('script_time')


def test_a_script_that_is_missing_or_fails_is_one_line(script_time, tmp_path, capsys):
    for script, said in (
        (tmp_path / 'train.py', 'no script'),
        (tmp_path / 'bad.py', 'ended with exit code 1: no such data'),
    ):
        if script.name == 'bad.py':
            script.write_text('raise SystemExit("no such data")')
        with pytest.raises(SystemExit, match='2'):
            script_time.main([*SMALL, '--script', str(script)])
        assert said in capsys.readouterr().err


def test_the_commands_differ_in_the_flags_of_the_teacher_alone(script_time, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script_time, 'run', lambda command, threads: asked.append(command) or float(len(asked)))
    script_time.main([*SMALL, '--output', str(tmp_path / 'result.json')])
    timm, ours = (set(command[2:]) for command in asked[:2])
    assert {flag for flag in timm ^ ours if flag.startswith('--')} == {'--teacher', '--teacher-dtype', '--kd-model-name', '--kd-distill-type'}  # fmt: skip
    assert ['--teacher' in command for command in asked] == [False, True, True, False]  # in turn, the order changing
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['seconds'] == {'ours': [2.0, 3.0], 'timm': [1.0, 4.0]}
    assert result['ratio']['mean'] == pytest.approx((2 / 1 + 3 / 4) / 2)


@pytest.mark.long
def test_both_scripts_run(script_time, capsys):
    script_time.main(SMALL)
    assert 'ours / timm: ' in capsys.readouterr().out
