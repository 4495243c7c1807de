"""Readers on the variants that public mirrors show, on damaged files, and at real scale."""
import shutil, time

import numpy as np
import pytest

from oneshui.data import FacesError, Pixels, Request, audit_identities, make_faces, make_request, read_celeba, read_celebahq, read_csv, read_faces, read_mufac, simulate_requests
from oneshui.portraits import ATTRIBUTES


@pytest.fixture
def tree(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / 'data'); return tmp_path / 'data'


def same(a, b): assert a.fingerprint == b.fingerprint and a.paths.tolist() == b.paths.tolist()


def test_header_in_the_identity_file(tree):
    plain = read_celeba(tree / 'celeba'); f = tree / 'celeba/identity_CelebA.txt'
    f.write_text('image_id identity\n' + f.read_text()); same(read_celeba(tree / 'celeba'), plain)


def test_csv_twins(tree):
    root = tree / 'celeba'; plain = read_celeba(root)
    lines = (root / 'list_attr_celeba.txt').read_text().splitlines()
    (root / 'list_attr_celeba.csv').write_text(
        '\n'.join(['image_id,' + ','.join(lines[1].split())] + [','.join(l.split()) for l in lines[2:]]) + '\n'
    )
    (root / 'identity_CelebA.csv').write_text(
        'image_id,identity\n' + (root / 'identity_CelebA.txt').read_text().replace(' ', ',')
    )
    for n in ('list_attr_celeba.txt', 'identity_CelebA.txt'): (root / n).unlink()
    same(read_celeba(root), plain)


def test_other_attribute_order_and_windows_line_ends(tree):
    f = tree / 'celeba/list_attr_celeba.txt'
    plain = read_celeba(tree / 'celeba')
    lines = f.read_text().splitlines()
    names = lines[1].split(); rows = [l.split() for l in lines[2:]]
    f.write_bytes('\r\n'.join([lines[0], ' '.join(names[::-1])] + [' '.join([r[0], *r[:0:-1]]) for r in rows]).encode() + b'\r\n')
    same(read_celeba(tree / 'celeba'), plain)


def test_nested_image_folder(tree):
    plain = read_celeba(tree / 'celeba'); d = tree / 'celeba/img_align_celeba'
    shutil.move(d, tree / 'inner')
    d.mkdir()
    shutil.move(tree / 'inner', d / 'img_align_celeba')
    again = read_celeba(tree / 'celeba')
    assert len(again) == len(plain) and (again.targets == plain.targets).all()


def test_missing_images_are_counted(tree):
    n = len(read_celebahq(tree / 'CelebAMask-HQ')); (tree / 'CelebAMask-HQ/CelebA-HQ-img/3.jpg').unlink()
    faces = read_celebahq(tree / 'CelebAMask-HQ')
    assert len(faces) == n - 1 and faces.skipped == {'image file missing': 1} and '1 rows skipped' in repr(faces)


def test_a_truncated_annotation_is_named(tree):
    f = tree / 'celeba/list_attr_celeba.txt'; f.write_text(f.read_text()[:-30])
    with pytest.raises(FacesError, match=r'list_attr_celeba.txt: row .* fewer than 41 columns'):
        read_celeba(tree / 'celeba')


def test_a_row_with_too_many_columns_is_named(tree):
    f = tree / 'celeba/list_attr_celeba.txt'
    l = f.read_text().splitlines()
    l[5] += ' 1 1'
    f.write_text('\n'.join(l) + '\n')
    with pytest.raises(FacesError, match='list_attr_celeba.txt'): read_celeba(tree / 'celeba')


def test_a_truncated_image_is_named_before_training(tree, tmp_path):
    faces = read_mufac(tree / 'mufac')
    p = tree / 'mufac' / faces.paths[7]
    p.write_bytes(p.read_bytes()[:200])
    with pytest.raises(FacesError, match=str(p.name)): Pixels(faces, 32, tmp_path / 'cache')
    assert not list((tmp_path / 'cache').glob('*.npy'))


def test_mufac_bad_age_and_missing_column(tree):
    f = tree / 'mufac/custom_val_dataset.csv'
    good = f.read_text()
    lines = good.splitlines()
    cells = lines[1].split(',')
    cells[2] = 'k'
    lines[1] = ','.join(cells)
    f.write_text('\n'.join(lines))
    with pytest.raises(FacesError, match=r'custom_val_dataset.csv: row 2, age_class is "k"'):
        read_mufac(tree / 'mufac')
    f.write_text(good.replace('person_id', 'pid'))
    with pytest.raises(FacesError, match='person_id is missing'): read_mufac(tree / 'mufac')


def test_no_folder(tmp_path):
    with pytest.raises(FacesError, match='no such folder'): read_faces('celeba', tmp_path)
    with pytest.raises(FacesError, match='Valid: celebahq, celeba, mufac'): read_faces('lfw', tmp_path)


def test_merged_identities_are_people(tree):
    plain, merged = read_mufac(tree / 'mufac'), read_faces('mufac_merged', tree); a = audit_identities(plain)
    assert a['groups_across_identities'] > 0 and len(merged.identities) == a['people'] and len(merged) == a['distinct_images']
    assert audit_identities(merged)['groups_across_identities'] == 0


def test_csv_of_your_own(tree, tmp_path):
    (tree / 'mine.csv').write_text(
        'path,identity,hat,smile\nceleba/img_align_celeba/000001.jpg,Ann,1,0\nceleba/img_align_celeba/000002.jpg,Bo,0,1\nno.jpg,Bo,0,1\n'
    )
    f = read_faces('mine.csv', tree)
    assert f.task == 'multilabel' and f.classes == ['hat', 'smile'] and len(f) == 2 and f.skipped == {'image file missing': 1}
    (tree / 'ages.csv').write_text(
        'path,identity,age\nceleba/img_align_celeba/000001.jpg,Ann,old\nceleba/img_align_celeba/000002.jpg,Bo,young\n'
    )
    assert read_faces('ages.csv', tree).targets.tolist() == [0, 1]
    (tree / 'bad.csv').write_text('path,identity,hat,smile\na.jpg,Ann,1,7\n')
    with pytest.raises(FacesError, match=r'row 2, smile is "7"'):
        read_csv(tree / 'bad.csv', check_images=False)


def test_request_is_reproducible_and_rechecked(data_dir, tmp_path):
    faces = read_faces('celeba', data_dir)
    r = make_request(faces, 2, 5, (2, 3))
    r.save(tmp_path / 'r.json')
    again = Request.load(tmp_path / 'r.json', faces)
    for k in Request.SETS: assert np.array_equal(getattr(r, k), getattr(again, k))
    assert not np.array_equal(make_request(faces, 2, 6, (2, 3)).support, r.support)
    with pytest.raises(FacesError, match='another celeba table'):
        Request.load(tmp_path / 'r.json', read_faces('mufac', data_dir))


def test_one_person_needs_more_than_five_images():
    who = np.repeat(np.arange(20), 5)
    faces = make_faces('toy', '.', [str(i) for i in range(100)], who, np.zeros((100, 2)), 'multilabel', ['a', 'b'])
    with pytest.raises(FacesError, match='more than five'): make_request(faces, 1, 0)
    assert len(make_request(faces, 2, 0).forget) == 8


def test_single_image_identities_are_never_asked():
    who = np.concatenate([np.arange(50), np.repeat(np.arange(50, 60), 4)])
    faces = make_faces('toy', '.', [str(i) for i in range(90)], who, np.zeros((90, 2)), 'multilabel', ['a', 'b'])
    r = make_request(faces, 3, 1); assert (np.bincount(faces.identity)[r.forget_identities] > 1).all()
    for S, F in simulate_requests(faces.identity, r.train, 2, np.random.default_rng(0)):
        assert not set(S) & set(F)


def test_real_scale(tmp_path):
    "CelebA's size: made-up annotation files are read and split in seconds."
    rng = np.random.default_rng(0)
    n, k = 202_599, 10_177
    who = rng.integers(1, k + 1, n)
    root = tmp_path / 'celeba'
    root.mkdir()
    (root / 'identity_CelebA.txt').write_text(''.join(f'{i + 1:06d}.jpg {w}\n' for i, w in enumerate(who)))
    pool = [' '.join(f'{v:2d}' for v in rng.choice([-1, 1], 40)) for _ in range(64)]
    (root / 'list_attr_celeba.txt').write_text(
        f'{n}\n' + ' '.join(ATTRIBUTES) + ' \n' + ''.join(f'{i + 1:06d}.jpg {pool[i % 64]}\n' for i in range(n))
    )
    t = time.perf_counter()
    faces = read_celeba(root, check_images=False)
    r = make_request(faces, 10, 0, (5, 10))
    simulate_requests(faces.identity, r.train, 10, rng)
    t = time.perf_counter() - t
    assert len(faces) == n and t < 60, t   # a few seconds; the bound only catches a quadratic loop


def test_the_official_spacing(tree):
    "CelebAMask-HQ as published: a space after the last name, two after the file name, some rows with one at their end."
    f = tree / 'CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt'
    plain = read_celebahq(tree / 'CelebAMask-HQ')
    l = f.read_text().splitlines()
    assert l[1].endswith(' ') and '.jpg  ' in l[2]
    f.write_text('\n'.join(x + ' ' * (i % 3) for i, x in enumerate(l)) + '\n')
    same(read_celebahq(tree / 'CelebAMask-HQ'), plain)
