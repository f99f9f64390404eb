import json
from pathlib import Path

import pytest
import safetensors.torch
import timm

from timm_pe import demo
from timm_pe.errors import UsageError


@pytest.mark.long
def test_the_demo_leaves_its_table_numbers_curves_and_student(tmp_path, monkeypatch, capsys):
    for name in ('TEACHER', 'STUDENT'):  # the real thing, but two epochs long
        argv = list(getattr(demo, name))
        argv[argv.index('--epochs') + 1] = '2'
        monkeypatch.setattr(demo, name, [*argv, '--warmup-epochs', '0'])
    demo.main(['--output', str(tmp_path / 'out'), '--seeds', '2'])
    said = capsys.readouterr().out
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    for kind in ('teacher', 'student', 'student_pe'):
        assert set(results[kind]) >= {'top1', 'params', 'seconds'}
        assert f'{results[kind]["top1"]:.2f}' in said
    assert len(results['student_pe']['top1_of_seeds']) == 2
    assert results['student']['params'] == results['student_pe']['params'] == 255434
    weights = safetensors.torch.load_file(tmp_path / 'out' / 'student.safetensors')
    student = timm.create_model('test_vit', num_classes=10, patch_size=4, img_size=16)
    student.load_state_dict(weights)
    assert (tmp_path / 'out' / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert said.count('top-1') == 6  # a line a run, and the table's head
    assert said.splitlines()[-1].endswith('out: report.html, results.json, curves.png, student.safetensors, runs/')
    page = (tmp_path / 'out' / 'report.html').read_text()
    for name in ('teacher', 'student-1', 'student-2', 'student_pe-1', 'student_pe-2'):
        assert f'--experiment {name}' in page
        assert (tmp_path / 'out' / 'runs' / name / 'analysis.json').is_file()
    assert '--teacher cifar_resnet20' in results['student_pe']['command']


def test_the_demo_goes_on_without_what_its_report_needs(tmp_path, monkeypatch, capsys):
    def write_report(folders, path):
        raise UsageError("the analysis needs matplotlib: pip install 'timm_pe[analysis]'")

    monkeypatch.setattr(demo, 'write_report', write_report)
    demo.add_report(tmp_path, ['teacher'])
    err = capsys.readouterr().err
    assert err == "no report.html: the analysis needs matplotlib: pip install 'timm_pe[analysis]'\n"


def test_the_end_of_the_demo_is_printed_as_readme_shows_it():
    def row(params, top1, std=None):
        return {'params': params, 'top1': top1, 'top1_std': std, 'top1_of_seeds': [top1] * 3}

    results = {
        'teacher': row(272474, 98.33),
        'student': row(255434, 92.14, 1.51),
        'student_pe': row(255434, 96.48, 0.80),
        'difference': {'top1': 4.34, 'top1_interval': (-0.91, 9.59), 'top1_of_seeds': [4.0, 4.0, 5.0]},
    }
    assert demo.format_table(results) in (Path(__file__).resolve().parents[1] / 'README.md').read_text()
