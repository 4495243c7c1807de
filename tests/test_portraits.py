"""The drawings: the same pixels whoever draws them."""
from oneshui.portraits import write_portraits


def test_workers_draw_the_same_bytes(tmp_path):
    # several batches of 32, since what went wrong once depended on what a process had drawn before
    people = dict(celebahq=(12, 3, 5), celeba=(8, 3, 5), mufac=(16, 3, 5))
    serial, parallel = (write_portraits(tmp_path / str(n), **people, n_jobs=n) for n in (1, 2))
    files = sorted(p.relative_to(serial) for p in serial.rglob('*') if p.is_file())
    assert len(files) > 100 and files == sorted(p.relative_to(parallel) for p in parallel.rglob('*') if p.is_file())
    assert [str(f) for f in files if (serial / f).read_bytes() != (parallel / f).read_bytes()] == []
