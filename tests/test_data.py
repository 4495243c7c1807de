"""Faces and requests; readers on variants of the files, damaged files, real scale."""
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oneshui.core import DataError, PresetError
from oneshui.data import (
    Pixels, Request, check_request, make_faces, make_request, portrait,
    simulate_requests)
from oneshui.readers import (
    ATTRIBUTES, DATASETS, audit_identities, dataset, get_dataset, read_celeba,
    read_celebahq, read_csv, read_faces, read_mufac, shared_images)


@pytest.fixture
def tree(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / 'data')
    return tmp_path / 'data'


def same(a, b):
    assert a.fingerprint == b.fingerprint and a.paths.tolist() == b.paths.tolist()


def toy(who):
    "A table without image files."
    n = len(who)
    return make_faces('toy', 'nowhere', [str(i) for i in range(n)], who,
                      np.zeros((n, 2)), 'multilabel', ['a', 'b'])


# Variants of the official files

def test_header_in_the_identity_file(tree):
    plain = read_celeba(tree / 'celeba')
    f = tree / 'celeba/identity_CelebA.txt'
    f.write_text('image_id identity\n' + f.read_text())
    same(read_celeba(tree / 'celeba'), plain)


def test_csv_twins(tree):
    root = tree / 'celeba'
    plain = read_celeba(root)
    names, *rows = (root / 'list_attr_celeba.txt').read_text().splitlines()[1:]
    lines = [','.join(line.split()) for line in (f'image_id {names}', *rows)]
    (root / 'list_attr_celeba.csv').write_text('\n'.join(lines) + '\n')
    identities = (root / 'identity_CelebA.txt').read_text().replace(' ', ',')
    (root / 'identity_CelebA.csv').write_text('image_id,identity\n' + identities)
    for n in ('list_attr_celeba.txt', 'identity_CelebA.txt'): (root / n).unlink()
    same(read_celeba(root), plain)


def test_other_attribute_order_and_windows_line_ends(tree):
    f = tree / 'celeba/list_attr_celeba.txt'
    plain = read_celeba(tree / 'celeba')
    count, names, *rows = f.read_text().splitlines()
    backwards = [' '.join([r.split()[0], *r.split()[:0:-1]]) for r in rows]
    lines = [count, ' '.join(names.split()[::-1]), *backwards, '']
    f.write_bytes('\r\n'.join(lines).encode())
    same(read_celeba(tree / 'celeba'), plain)


def test_the_official_spacing(tree):
    "CelebAMask-HQ as published: spaces after the last name, some at the end of rows."
    f = tree / 'CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt'
    plain = read_celebahq(tree / 'CelebAMask-HQ')
    lines = f.read_text().splitlines()
    assert lines[1].endswith(' ') and '.jpg  ' in lines[2]
    f.write_text('\n'.join(x + ' ' * (i % 3) for i, x in enumerate(lines)) + '\n')
    same(read_celebahq(tree / 'CelebAMask-HQ'), plain)


def test_nested_image_folder(tree):
    plain, d = read_celeba(tree / 'celeba'), tree / 'celeba/img_align_celeba'
    shutil.move(d, tree / 'inner')
    d.mkdir()
    shutil.move(tree / 'inner', d / 'img_align_celeba')
    again = read_celeba(tree / 'celeba')
    assert len(again) == len(plain) and (again.targets == plain.targets).all()


def test_missing_images_are_counted(tree):
    n = len(read_celebahq(tree / 'CelebAMask-HQ'))
    (tree / 'CelebAMask-HQ/CelebA-HQ-img/3.jpg').unlink()
    faces = read_celebahq(tree / 'CelebAMask-HQ')
    assert len(faces) == n - 1 and faces.skipped == {'image file missing': 1}
    assert '1 rows skipped' in repr(faces)


# Damaged files

def test_a_truncated_annotation_is_named(tree):
    f = tree / 'celeba/list_attr_celeba.txt'
    f.write_text(f.read_text()[:-30])
    last = len(f.read_text().splitlines())
    says = f'{f.name}: row {last}, .* fewer than 41 columns'
    with pytest.raises(DataError, match=says): read_celeba(tree / 'celeba')


def test_a_row_with_too_many_columns_is_named(tree):
    f = tree / 'celeba/list_attr_celeba.txt'
    lines = f.read_text().splitlines()
    lines[5] += ' 1 1'
    f.write_text('\n'.join(lines) + '\n')
    with pytest.raises(DataError, match='list_attr_celeba.txt'):
        read_celeba(tree / 'celeba')


@pytest.mark.parametrize('damage, says', [
    (lambda lines: [*lines, lines[-1]], 'row {next}, "{file}" is listed for the sec'),
    (lambda lines: [*lines[:-1], lines[-1][:-2] + ' 2'], 'row {last}, .*Young is "2"'),
    (lambda lines: [s.replace('Bald', 'Hairless') for s in lines], 'Hairless'),
    (lambda lines: lines[2:], 'row 1 holds no attribute names'),
    (lambda lines: [], 'list_attr_celeba.txt')])
def test_a_damaged_annotation_is_named(tree, damage, says):
    f = tree / 'celeba/list_attr_celeba.txt'
    lines = f.read_text().splitlines()
    n, file = len(lines), lines[-1].split()[0]
    says = says.format(last=n, next=n + 1, file=file)
    f.write_text('\n'.join(damage(lines)))
    with pytest.raises(DataError, match=says): read_celeba(tree / 'celeba')


def test_a_truncated_image_is_named_before_training(tree, tmp_path):
    faces = read_mufac(tree / 'mufac')
    p = tree / 'mufac' / faces.paths[7]
    p.write_bytes(p.read_bytes()[:200])
    cache = tmp_path / 'cache'
    with pytest.raises(DataError, match=p.name): Pixels(faces, 32, cache)
    assert not list(cache.glob('*.npy'))


def test_mufac_bad_age_and_missing_column(tree):
    f = tree / 'mufac/custom_val_dataset.csv'
    good = f.read_text()
    header, first, *rest = good.splitlines()
    family, person, _, path = first.split(',')
    f.write_text('\n'.join([header, f'{family},{person},k,{path}', *rest]))
    with pytest.raises(DataError, match=f'{f.name}: row 2, age_class is "k"'):
        read_mufac(tree / 'mufac')
    f.write_text('\n'.join([header, first, f',{person},a,{path}']))
    with pytest.raises(DataError, match=f'{f.name}: row 3, family_id is empty'):
        read_mufac(tree / 'mufac')
    f.write_text(good.replace('person_id', 'pid'))
    with pytest.raises(DataError, match='person_id is missing'):
        read_mufac(tree / 'mufac')


def test_mufac_rows_listed_twice_count_once(tree):
    f = tree / 'mufac/custom_val_dataset.csv'
    plain, lines = read_mufac(tree / 'mufac'), f.read_text().splitlines()
    f.write_text('\n'.join([*lines, lines[1]]))
    again = read_mufac(tree / 'mufac')
    assert again.skipped == {'row listed twice': 1}
    same(again, plain)


def test_no_folder_and_no_such_name(tmp_path):
    with pytest.raises(DataError, match='no such folder'):
        read_faces('celeba', tmp_path)
    with pytest.raises(PresetError, match='Valid: celebahq, celeba, mufac'):
        read_faces('lfw', tmp_path)


# Identities

def test_merged_identities_are_people(tree):
    plain, merged = read_mufac(tree / 'mufac'), read_faces('mufac_merged', tree)
    a = audit_identities(plain)
    assert a['groups_across_identities'] > 0
    assert len(merged.identities) == a['people'] and len(merged) == a['distinct_images']
    assert audit_identities(merged)['groups_across_identities'] == 0


def test_shared_images_are_those_of_d_f_in_d_r(tree):
    faces = read_mufac(tree / 'mufac')
    shares = [shared_images(faces, make_request(faces, 4, seed)) for seed in range(12)]
    assert max(shares) > 0
    merged = read_faces('mufac_merged', tree)
    assert shared_images(merged, make_request(merged, 4, 0)) == 0


# Fingerprints

def test_the_fingerprint_covers_every_byte_of_every_image(tree, tmp_path):
    plain = read_celeba(tree / 'celeba')
    key, cache = plain.fingerprint, tmp_path / 'cache'
    Pixels(plain, 32, cache)
    f = tree / 'celeba' / plain.paths[11]
    content = bytearray(f.read_bytes())
    content[-3] ^= 1                       # as long as before
    f.write_bytes(content)
    again = read_celeba(tree / 'celeba')
    assert again.fingerprint != key
    assert again.table_fingerprint == plain.table_fingerprint
    Pixels(again, 32, cache)
    assert len(list(cache.glob('*.npy'))) == 2, 'changed images need another map'


def test_the_fingerprint_covers_labels(tree):
    faces = read_celeba(tree / 'celeba')
    y = faces.targets.copy()
    y[3, 7] = 1 - y[3, 7]
    assert replace(faces, targets=y).fingerprint != faces.fingerprint
    who = faces.identity.copy()
    who[0] = who[0] + 1 if who[0] == 0 else 0
    assert replace(faces, identity=who).fingerprint != faces.fingerprint


def test_an_image_is_read_once_in_a_process(tree, monkeypatch):
    faces = read_mufac(tree / 'mufac')
    key = faces.fingerprint

    def refuse(*args, **kw): raise AssertionError('read again')
    merged, again = read_faces('mufac_merged', tree), replace(faces)
    monkeypatch.setattr('builtins.open', refuse)
    assert again.fingerprint == key and merged.fingerprint != key


def test_annotations_without_images_have_a_fingerprint(tree):
    shutil.rmtree(tree / 'celeba/img_align_celeba')
    a, b = (read_celeba(tree / 'celeba', check_images=False) for _ in range(2))
    assert a.fingerprint == b.fingerprint and len(set(a.image_digests)) == len(a)


# Data sets from outside

def test_csv_of_your_own(tree):
    celeba = 'celeba/img_align_celeba'
    (tree / 'mine.csv').write_text(
        f'path,identity,hat,smile\n{celeba}/000001.jpg,Ann,1,0\n'
        f'{celeba}/000002.jpg,Bo,0,1\nno.jpg,Bo,0,1\n')
    f = read_faces('mine.csv', tree)
    assert f.task == 'multilabel' and f.classes == ['hat', 'smile']
    assert len(f) == 2 and f.skipped == {'image file missing': 1}
    (tree / 'ages.csv').write_text(
        f'path,identity,age\n{celeba}/000001.jpg,Ann,old\n'
        f'{celeba}/000002.jpg,Bo,young\n')
    assert read_faces('ages.csv', tree).targets.tolist() == [0, 1]
    (tree / 'spaces.csv').write_text(
        f'path,identity,age\n{celeba}/000001.jpg,Ann ,old\n'
        f'{celeba}/000002.jpg, Ann,old \n')
    f = read_faces('spaces.csv', tree)
    assert len(set(f.identity)) == len(f.classes) == 1, 'one person, one class'


@pytest.mark.parametrize('text, says', [
    ('path,identity,hat,smile\na.jpg,Ann,1,7\n', 'row 2, smile is "7"'),
    ('path,identity,hat\na.jpg,Ann,1\nb.jpg, ,1\n', 'row 3, identity is empty'),
    ('path,who,hat\na.jpg,Ann,1\n', 'expected path, identity'),
    ('path,identity\na.jpg,Ann\n', 'at least one target column'),
    ('path,identity,hat\na.jpg,Ann,1\na.jpg ,Bo,1\n', 'row 3, "a.jpg" is listed for'),
    ('path,identity,hat\na.jpg,Ann,1,1,1\nb.jpg,Bo\n', 'bad.csv')])
def test_a_damaged_csv_is_named(tmp_path, text, says):
    (tmp_path / 'bad.csv').write_text(text)
    with pytest.raises(DataError, match=says): read_csv(tmp_path / 'bad.csv', False)


def test_a_csv_is_a_data_set_like_any_other(tree):
    faces = read_celeba(tree / 'celeba')
    rows = [f'celeba/{p},{faces.identities[i]},{int(y[20])},{int(y[31])}'
            for p, i, y in zip(faces.paths, faces.identity, faces.targets)]
    (tree / 'staff.csv').write_text('\n'.join(['path,identity,male,smile', *rows]))
    staff, declared = read_faces('staff.csv', tree), get_dataset('staff.csv')
    assert declared.table == 'table_staff' and declared.folder is None
    assert declared.title == 'staff' and declared.read is read_csv
    r = make_request(staff, 2, 0)
    assert r.dataset == staff.name == 'staff.csv', 'by this name it is read again'
    assert r.support.tolist() == make_request(faces, 2, 0).support.tolist()


def test_a_data_set_added_from_outside(tree):
    @dataset('Passports', folder='celeba')
    def read_passports(root, check_images=True):
        names = sorted(os.listdir(root / 'img_align_celeba'))
        paths = [f'img_align_celeba/{n}' for n in names]
        return make_faces('passports', root, paths, [n[:5] for n in names],
                          [int(n[5]) % 2 for n in names], 'multiclass', ['even', 'odd'])
    try:
        assert DATASETS['passports'].table == 'table_passports'
        r = make_request(read_faces('passports', tree), 2, 0)
        assert r.dataset == 'passports' and len(r.support) == 2
    finally: del DATASETS['passports']


def test_a_package_adds_a_data_set_by_an_entry_point(tmp_path):
    info = tmp_path / 'passports-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: passports\nVersion: 1.0\n')
    points = '[oneshui.datasets]\npassports = passports\n'
    (info / 'entry_points.txt').write_text(points)
    (tmp_path / 'passports.py').write_text('''
from oneshui.data import make_faces
from oneshui.readers import dataset
@dataset('Passports', folder='passports')
def read_passports(root, check_images=True):
    return make_faces('passports', root, ['a', 'b'], ['Ann', 'Bo'], [0, 1],
                      'multiclass', ['even', 'odd'])
''')
    ask = 'from oneshui.readers import read_faces; print(read_faces("passports", "."))'
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=path))
    assert done.stdout.startswith('passports: 2 images of 2 identities'), done.stderr


# Requests

def test_request_is_reproducible_and_rechecked(data_dir, tmp_path):
    faces = read_faces('celeba', data_dir)
    r = make_request(faces, 2, 5, (2, 3))
    r.save(tmp_path / 'r.json')
    again = Request.load(tmp_path / 'r.json', faces)
    for k in Request.SETS: assert np.array_equal(getattr(r, k), getattr(again, k))
    assert (again.n_forget, again.seed, again.sizes) == (2, 5, (2, 3))
    assert not np.array_equal(make_request(faces, 2, 6, (2, 3)).support, r.support)
    with pytest.raises(DataError, match='another celeba table'):
        Request.load(tmp_path / 'r.json', read_faces('mufac', data_dir))


@pytest.mark.parametrize('break_it, says', [
    (lambda r: dict(val=r.test), 'is in val and in test'),
    (lambda r: dict(retain=r.train), 'is in forget and in retain'),
    (lambda r: dict(retain=np.append(r.retain, r.support)), 'image is trained on'),
    (lambda r: dict(support=r.support[::-1]), 'do not match'),
    (lambda r: dict(test=r.test[:0]), 'test is empty')])
def test_a_wrong_partition_is_refused(data_dir, break_it, says):
    faces = read_faces('celeba', data_dir)
    r = make_request(faces, 3, 0)
    check_request(r, faces)
    with pytest.raises(DataError, match=says):
        check_request(replace(r, **break_it(r)), faces)


def test_one_person_needs_more_than_five_images():
    faces = toy(np.repeat(np.arange(20), 5))
    with pytest.raises(DataError, match='more than five'): make_request(faces, 1, 0)
    assert len(make_request(faces, 2, 0).forget) == 8
    rich = toy(np.repeat(np.arange(20), 6))
    assert len(make_request(rich, 1, 0).forget) == 5


def test_requests_that_share_a_training_ask_of_different_people():
    faces = toy(np.repeat(np.arange(60), np.arange(60) % 9 + 1))
    asked = [make_request(faces, n, 3, (1, 4), requests=3, number=k)
             for k in range(3) for n in (1, 4)]
    for r in asked: assert np.array_equal(r.train, asked[0].train), 'one Pretrain'
    large = asked[1::2]
    people = np.concatenate([r.forget_identities for r in large])
    assert len(np.unique(people)) == 12, 'nobody asks twice'
    portraits = np.concatenate([r.support for r in large])
    for r in asked:
        assert not np.isin(portraits, r.train).any(), 'no portrait is trained on'
        others = np.setdiff1d(people, r.forget_identities)
        assert set(others) <= set(faces.identity[r.retain]), 'who does not ask stays'
    for small, r in zip(asked[::2], large):
        assert small.forget_identities[0] == r.forget_identities[0]
        assert faces.count[small.forget_identities[0]] > 5
    with pytest.raises(DataError, match='requests count from 0'):
        make_request(faces, 4, 3, requests=3, number=3)
    with pytest.raises(DataError, match='20 requests of N_S = 4 people cannot'):
        make_request(faces, 4, 3, requests=20)


def test_too_few_people_are_named():
    faces = toy(np.repeat(np.arange(10), 5))
    with pytest.raises(DataError, match='N_S = 50 people cannot be drawn: 6 of the 6'):
        make_request(faces, 50, 0)
    with pytest.raises(DataError, match='somebody has to'): make_request(faces, 0, 0)


def test_single_image_identities_are_never_asked():
    faces = toy(np.concatenate([np.arange(50), np.repeat(np.arange(50, 60), 4)]))
    r = make_request(faces, 3, 1)
    assert (faces.count[r.forget_identities] > 1).all()
    rehearse = [faces.identity, r.train, 2, np.random.default_rng(0)]
    for S, F in simulate_requests(*rehearse): assert not set(S) & set(F)
    reused = simulate_requests(*rehearse, 'reuse')   # as in the released code
    assert any(set(S) & set(F) for S, F in reused), 'one image on both sides'
    with pytest.raises(PresetError, match='Valid: skip, reuse'):
        simulate_requests(*rehearse, 'skipp')


def test_real_scale(tmp_path):
    "CelebA's size: made-up annotation files are read and split in seconds."
    rng = np.random.default_rng(0)
    n, k, root = 202_599, 10_177, tmp_path / 'celeba'
    root.mkdir()
    who = [f'{i + 1:06d}.jpg {w}\n' for i, w in enumerate(rng.integers(1, k + 1, n))]
    (root / 'identity_CelebA.txt').write_text(''.join(who))
    pool = [' '.join(f'{v:2d}' for v in rng.choice([-1, 1], 40)) for _ in range(64)]
    rows = [f'{i + 1:06d}.jpg {pool[i % 64]}\n' for i in range(n)]
    names = ' '.join(ATTRIBUTES)
    (root / 'list_attr_celeba.txt').write_text(f'{n}\n{names} \n' + ''.join(rows))
    t = time.perf_counter()
    faces = read_celeba(root, check_images=False)
    r = make_request(faces, 10, 0, (5, 10))
    simulate_requests(faces.identity, r.train, 10, rng)
    t = time.perf_counter() - t
    assert len(faces) == n
    assert t < 60, t   # a few seconds; the bound only catches a quadratic loop


def test_many_images_are_hashed_in_seconds(tmp_path):
    n = 5000
    for i in range(n): (tmp_path / str(i)).write_bytes(b'%d' % i * 200)
    faces = make_faces('many', tmp_path, [str(i) for i in range(n)], np.arange(n) // 2,
                       np.zeros(n), 'multiclass', ['any'])
    t = time.perf_counter()
    digests = faces.image_digests
    t = time.perf_counter() - t
    assert len(set(digests)) == n and t < 10, t


def test_a_large_jpeg_is_decoded_as_small_as_it_is_wanted(tree, monkeypatch):
    faces = read_celeba(tree / 'celeba')
    f = tree / 'celeba' / faces.paths[0]
    Image.open(f).resize((512, 512), Image.BICUBIC).save(f, 'JPEG', quality=92)
    whole = Image.fromarray(portrait(faces, 0)).resize((32, 32), Image.BILINEAR)
    decoded, opened = [], Image.open
    keep = lambda p: decoded.append(opened(p)) or decoded[-1]
    monkeypatch.setattr(Image, 'open', keep)
    small = portrait(faces, 0, 32).astype(int)
    assert decoded[0].size == (64, 64), 'an eighth of it'
    off = np.abs(small - np.asarray(whole))
    assert off.mean() < 1 and off.max() <= 8, 'levels, of 255'


def test_pixels_with_and_without_a_map(data_dir, tmp_path):
    faces = read_faces('celeba', data_dir)
    mapped, decoded = Pixels(faces, 24, tmp_path), Pixels(faces, 24, None)
    assert mapped.map is not None and decoded.map is None
    assert (mapped.batch([5, 2]) == decoded.batch([5, 2])).all()
    assert Pixels(faces, 24, tmp_path, max_bytes=10).map is None
    assert len([*Path(tmp_path).glob('*.npy')]) == 1
