"""The drawings: the same pixels whoever draws them, and those of their VERSION."""
import numpy as np
import pytest

from oneshui.portraits import (
    AGEING, VERSION, Crowd, annotate_age, annotate_attributes, at_age, draw_person,
    draw_photo, family_ages, label_statistics, render, visible_attributes,
    write_portraits)


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


# Mean brightness of the sixteen squares of a portrait, in VERSION 6
GOLDEN = {   # (person, age group, photo, likeness)
    (3, None, 0, 0.): [[141.8, 163.3, 160.3, 140.2], [140.5, 169.1, 168.4, 141.5],
                   [131.3, 169.4, 171.8, 134.3], [116.8, 127.9, 134.3, 116.5]],
    (1, 1, 2, 0.): [[176.8, 132.7, 127.3, 178.3], [163.3, 95.1, 95.3, 171.4],
                [157.1, 108.8, 116.3, 162.0], [155.1, 162.2, 162.4, 152.6]],
    (3, None, 0, 1.): [[132.2, 82.5, 103.6, 128.1], [131.2, 106.5, 121.4, 129.4],
                       [122.4, 150.0, 153.4, 122.7], [108.8, 116.2, 121.5, 106.5]],
    (1, 1, 2, 1.): [[197.0, 146.3, 143.0, 200.4], [173.3, 108.0, 111.4, 192.6],
                    [175.5, 113.6, 128.2, 182.1], [172.7, 159.7, 174.0, 171.5]],
    (9, 7, 3, 0.): [[194.0, 192.1, 191.0, 181.8], [179.8, 158.3, 145.5, 172.5],
                [166.8, 132.6, 123.9, 160.4], [155.9, 177.7, 172.1, 148.0]]}
LABELS = {0.: (6, 1244, 1493), 1.: (6, 1230, 1175)}   # VERSION, labels seen, filed


def squares(person, group, photo, likeness):
    p = (draw_person(0, person, group, likeness) if group is None
         else at_age(0, person, group, likeness))
    img = render(p, draw_photo(0, person, photo, p), 64)
    return img.reshape(4, 16, 4, 16, 3).mean((1, 3, 4))


@pytest.mark.parametrize('who', GOLDEN, ids=str)
def test_drawings_are_those_of_their_version(who):
    apart = np.abs(squares(*who) - GOLDEN[who]).max()
    assert VERSION == 6 and apart < 1, (
        'drawings changed: raise portraits.VERSION, and put new numbers here')


@pytest.mark.parametrize('likeness', LABELS)
def test_labels_are_those_of_their_version(likeness):
    seen, filed = [], []
    for i in range(40):
        p = draw_person(0, i, likeness=likeness)
        y = np.stack([visible_attributes(p, draw_photo(0, i, j, p)) for j in range(3)])
        seen.append(y.sum())
        filed.append(annotate_attributes(y, 0, i, likeness).sum())
    assert (VERSION, sum(seen), sum(filed)) == LABELS[likeness], (
        'labels changed: raise portraits.VERSION, and put new numbers here')
    assert sum(annotate_age(i % 8, 0, i) for i in range(40)) == 140


def labels(likeness, people=600, photos=5):
    for i in range(people):
        p = draw_person(7, i, likeness=likeness)
        y = np.stack([visible_attributes(p, draw_photo(7, i, j, p))
                      for j in range(photos)])
        yield annotate_attributes(y, 7, i, likeness)


def test_labels_agree_as_in_celebahq():
    # share of positives, and how often two images of a person agree (public files)
    y, real = np.stack(list(labels(1.))).astype(float), label_statistics()
    n, yes = y.shape[1], y.sum(1)
    agree = ((yes * (yes - 1) + (n - yes) * (n - yes - 1)) / (n * (n - 1))).mean(0)
    assert abs(agree.mean() - .848) < .01 and abs(real.same_person.mean() - .848) < .001
    assert np.abs(agree - real.same_person).max() < .05   # 600 people: ± .02
    assert np.abs(y.mean((0, 1)) - real.share).max() < .06
    easy = np.stack(list(labels(0.))).astype(float)
    assert (easy == easy[:, :1]).mean() > .93, 'easy drawings agree nearly always'


def test_families_age_as_in_mufac():
    counts = Crowd('mufac', 0, 600, 8, 24).counts()
    assert counts.min() == 8 and np.median(counts) == 10
    filed, drawn = family_ages(np.arange(600) % 8, counts, 0, 1.)
    album = np.histogram2d(np.repeat(np.arange(600), counts), filed, (600, 8))[0]
    n, share = album.sum(1), album.sum(0) / album.sum()
    same = ((album * (album - 1)).sum(1) / (n * (n - 1))).mean()
    assert abs(same - .24) < .02 and abs((share ** 2).sum() - .16) < .01
    assert np.abs(share - [.22, .20, .17, .13, .14, .07, .04, .02]).max() < .02
    filed, drawn = family_ages(np.arange(600) % 8, counts, 0, 0.)
    easy = np.repeat(np.arange(600) % 8, counts)
    assert (filed == easy).all() and (drawn == easy).all()


def test_a_person_is_the_same_at_every_age():
    young, old = (at_age(0, 9, group) for group in (3, 7))
    assert young['years'] < 30 < 70 < old['years']
    assert all(young[k] == old[k] for k in young if k not in AGEING)
