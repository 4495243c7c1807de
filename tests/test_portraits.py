"""The drawings: the same pixels whoever draws them, and those of their VERSION."""
import numpy as np
import pytest

from oneshui.portraits import (
    VERSION, annotate_age, annotate_attributes, draw_person, draw_photo, render,
    visible_attributes, write_portraits)


def test_workers_draw_the_same_bytes(tmp_path):
    # several batches of 32: what went wrong once depended on what a process drew before
    people = dict(celebahq=(12, 3, 5), celeba=(8, 3, 5), mufac=(16, 3, 5))
    serial, parallel = (write_portraits(tmp_path / str(n), **people, n_jobs=n)
                        for n in (1, 2))
    def files(root): return sorted(p.relative_to(root) for p in root.rglob('*.*'))
    assert len(files(serial)) > 100 and files(serial) == files(parallel)
    other = [f for f in files(serial)
             if (serial / f).read_bytes() != (parallel / f).read_bytes()]
    assert not other


# Mean brightness of the sixteen squares of a portrait, in VERSION 5
GOLDEN = {   # (person, age group, photo, likeness)
    (3, None, 0, 0.): [[141.8, 163.3, 160.3, 140.2], [140.5, 169.1, 168.4, 141.5],
                   [131.3, 169.4, 171.8, 134.3], [116.8, 127.9, 134.3, 116.5]],
    (1, 1, 2, 0.): [[176.8, 132.7, 127.3, 178.3], [163.3, 95.1, 95.3, 171.4],
                [157.1, 108.8, 116.3, 162.0], [155.1, 162.2, 162.4, 152.6]],
    (9, 7, 3, 0.): [[194.0, 192.1, 191.0, 181.8], [179.8, 158.3, 145.5, 172.5],
                [166.8, 132.6, 123.9, 160.4], [155.9, 177.7, 172.1, 148.0]]}
LABELS = 5, 1244, 1493, 140   # VERSION, labels seen and filed, sum of age groups


def squares(person, group, photo, likeness):
    p = draw_person(0, person, group, likeness)
    img = render(p, draw_photo(0, person, photo, p), 64)
    return img.reshape(4, 16, 4, 16, 3).mean((1, 3, 4))


@pytest.mark.parametrize('who', GOLDEN, ids=str)
def test_drawings_are_those_of_their_version(who):
    apart = np.abs(squares(*who) - GOLDEN[who]).max()
    assert VERSION == 5 and apart < 1, (
        'drawings changed: raise portraits.VERSION, and put new numbers here')


def test_labels_are_those_of_their_version():
    seen, filed = [], []
    for i in range(40):
        p = draw_person(0, i, likeness=0)
        y = np.stack([visible_attributes(p, draw_photo(0, i, j, p)) for j in range(3)])
        seen.append(y.sum())
        filed.append(annotate_attributes(y, 0, i, 0).sum())
    ages = [annotate_age(i % 8, 0, i) for i in range(40)]
    assert (VERSION, sum(seen), sum(filed), sum(ages)) == LABELS, (
        'labels changed: raise portraits.VERSION, and put new numbers here')
