"""An audit of a model of one's own: known answers, controls, and what it refuses."""
import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from oneshui.aftermath import (
    bystander_verdict, bystanders_found, nearness_found, people_found, rank_among)
from oneshui.cli import run
from oneshui.core import PresetError
from oneshui.data import make_request
from oneshui.evidence import (
    ATTACKS, Case, attack_all, attack_verdict, false_alarms, found_by, least_p, rank_p,
    simulated_case, supported_fpr, u_lira_found)
from oneshui.findings import AuditReport, headline
from oneshui.handlers import Preprocessing
from oneshui.metrics import task_loss
from oneshui.photos import Photos, PhotoSet, read_people
from oneshui.portraits import write_portraits
from oneshui.readers import read_faces

NAMES = np.array([f'person {k}' for k in range(6000)])


@pytest.fixture(scope='module')
def known(): return simulated_case(known=3, after=3)


@pytest.fixture(scope='module')
def gone(): return simulated_case(known=3)


# Known answers

def test_everything_remembered_is_100_and_nothing_is_50_within_the_interval():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(10), 3), np.repeat(np.arange(30) + 100, 3)
    seen = found_by((rng.normal(9, 1, 30), rng.normal(0, 1, 90)), who)
    unseen = found_by((rng.normal(0, 1, 30), rng.normal(0, 1, 90)), who)
    assert seen['auc'] == seen['tpr'] == 100 and seen['tpr_low'] < 80
    assert unseen['auc_low'] < 50 < unseen['auc_high']
    assert seen['p'] < .001 and unseen['p'] > .05 and unseen['p_less'] > .05


def test_rank_test_is_exact_and_knows_what_it_cannot_show():
    assert rank_p(np.array([5.]), np.arange(4.)) == pytest.approx(.2) == least_p(1, 4)
    assert rank_p(np.array([3., 4.]), np.arange(3.)) == pytest.approx(.1)
    assert rank_p(np.array([-1.]), np.arange(4.), 'less') == pytest.approx(.2)
    assert rank_p(np.zeros(3), np.zeros(5)) == 1, 'ties say nothing'
    assert rank_among(9., np.arange(9.)) == pytest.approx(.1)
    nan = np.full(12, np.nan)
    assert rank_p(nan, np.full(40, np.nan)) == rank_among(np.nan, np.arange(9.)) == 1
    few = {k: dict(p=.2, p_less=1., least=.2) for k in ('before', 'after')}
    assert attack_verdict(few) == 'too few people'


def test_false_alarms_have_an_upper_bound():
    members, others = np.arange(10.) + 5, np.arange(20.) / 10
    assert false_alarms(members, others, .1, 20)['false'] == pytest.approx(10)
    none = false_alarms(members, others[:5], .1, 5)
    assert none['false'] == 0 and none['false_high'] > 40, 'five controls show little'


@pytest.mark.parametrize('people, asked, says', [
    (40, .01, 'needs 100 control people, there are 40'), (99, .001, 'needs 1,000'),
    (9, None, 'ten are the fewest'), (40, 1.5, 'between 0 and 1'), (40, 0., 'between')])
def test_a_rate_that_controls_cannot_carry_is_refused(people, asked, says):
    with pytest.raises(PresetError, match=re.escape(says)): supported_fpr(people, asked)


def test_a_rate_that_they_carry_is_given():
    assert [supported_fpr(n) for n in (10, 100, 1000, 99999)] == [.1, .01, .001, 1e-4]
    assert supported_fpr(20, .05) == .05
    case = simulated_case(known=3, controls=20)
    scores = ATTACKS['loss_attack'].fn(case, case.after)
    with pytest.raises(PresetError): found_by(*scores, .01)


# Both controls

def test_every_attack_is_judged_by_both_controls(known, gone):
    said = lambda case: {a['verdict'] for a in attack_all(case)[0].values()}
    assert said(known) == {'remembered'} and said(gone) == {'not found'}
    assert said(simulated_case()) == {'blind'}, 'before knew nobody'
    both = Case(known.before, known.after, known.before, known.references)
    assert said(both) == {'confounded'}, 'a Retrain that knows them'
    assert 'conspicuous' in said(simulated_case(known=3, after=-3))


def test_what_is_missing_is_listed_with_what_it_needs(known):
    found, missing = attack_all(Case(known.before, known.after))
    assert {*found} == {'loss_attack', 'range_attack'}
    assert ['--references' in needs for _, needs in missing] == [True, True]
    for o in (bare := Case(known.before, known.after)).models.values():
        kept = o.views.pop('portrait')
        assert ATTACKS['range_attack'].fn(bare, o) is None
        o.views['portrait'] = kept


def test_retrain_is_never_its_own_reference(known):
    case = Case(known.before, known.after, known.retrain)
    assert case.witnesses(known.retrain) == []
    assert case.witnesses(known.after) == [known.retrain]


def test_u_lira_counts_models(known, gone):
    told = u_lira_found([known.after, *known.forgotten], known.references)
    assert told['p'] == told['least'] == pytest.approx(1 / 35)
    two = u_lira_found([known.after, known.forgotten[0]], known.references)
    assert attack_verdict(dict(after=two)) == 'too few people'
    assert u_lira_found([gone.after, *gone.forgotten], gone.references)['p'] > .05


def test_whoever_is_still_known_is_named():
    case = simulated_case(known=3)
    three = torch.tensor(case.after.identity['forget'] < 3)[:, None]
    case.after.logits['forget'] += 8 * three
    said = people_found(case, NAMES).set_index('person').said
    assert (said[['person 0', 'person 1', 'person 2']] == 'still known').all()
    assert (said == 'still known').sum() <= 5


def test_bystanders(gone):
    calm = bystanders_found(gone, gone.after, NAMES)
    stirred = simulated_case(known=3, others=2.)
    found = bystanders_found(stirred, stirred.after, NAMES)
    assert bystander_verdict(calm) == 'not found'
    assert bystander_verdict(found) == 'easier' and found['easier'] > 50
    assert bystander_verdict(found | dict(controls=15)) == 'too few people'
    top = max(found['worst'], key=lambda w: w['gained'])
    assert top == found['worst'][0] and top['person'].startswith('person 10')


def test_nearness_knows_both_ends(known):
    pair = known.forgotten[0], known.references[0]
    at = lambda o: nearness_found(o, pair, False)['verdict']
    assert at(known.after) == 'nearer to Pretrain'
    assert at(known.retrain) == 'nearer to Retrain'
    kin = nearness_found(known.before, (known.before, known.retrain), True)
    assert kin['verdict'] == 'undecided' and kin['difference'] == 0


# On the drawn portraits, through the command

SIZES = dict(celebahq=(8, 3, 3), celeba=(60, 4, 4), mufac=(12, 4, 4))


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(),
                         nn.Linear(128, 40))


def write_table(root):
    "A CSV with splits, as the command reads it; who asked."
    faces = read_faces('celeba', root)
    r = make_request(faces, 8, 0)
    t = pd.DataFrame(faces.targets.astype(int), columns=faces.classes)
    t.insert(0, 'identity', [f'p{faces.identities[i]}' for i in faces.identity])
    t.insert(0, 'path', faces.paths)
    t['split'] = ''
    for s, rows in dict(train=r.train, portrait=r.support, val=r.val,
                        test=r.test).items(): t.loc[rows, 'split'] = s
    t[t.split != ''].to_csv(faces.root / 'staff.csv', index=False)
    asked = [f'p{faces.identities[i]}' for i in r.forget_identities]
    return faces.root / 'staff.csv', asked


def memorised(rows, photos, seed):
    torch.manual_seed(seed)
    net = network()
    x, y = PhotoSet(photos, rows).tensors()
    opt = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(25):
        for k in torch.randperm(len(x)).split(32):
            opt.zero_grad(); task_loss(net(x[k]), y[k]).backward(); opt.step()
    return net


@pytest.fixture(scope='module')
def office(tmp_path_factory, smoke):
    "Portraits of the smallest preset's size, a network, and its weights."
    folder = tmp_path_factory.mktemp('office')
    size = smoke.model.image_size
    table, asked = write_table(write_portraits(folder, **SIZES, size=size, n_jobs=1))
    people = read_people(table, 40)
    photos = Photos(people.faces, Preprocessing(size=(size, size)))
    rows = people.rows('train')
    them = np.isin(people.faces.identities[people.faces.identity[rows]], asked)
    (folder / 'net.py').write_text('from torch import nn\ndef net(): return '
        'nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), '
        'nn.Linear(128, 40))\n')
    for name, keep, seed in (('before', True, 0), ('retrain', False, 0),
                             ('ref', False, 1)):
        net = memorised(rows if keep else rows[~them], photos, seed)
        save_file(net.state_dict(), folder / f'{name}.safetensors')
    return SimpleNamespace(folder=folder, table=table, asked=asked)


def command(office, model_after, **given):
    "Run `oneshui audit`; its status, what it said, and the report's folder."
    f, out = office.folder, office.folder / 'report'
    shutil.rmtree(out, ignore_errors=True)
    at = lambda n: str(f / f'{n}.safetensors')
    words = dict(model=f'{f}/net.py:net', weights=at('before'), after=at(model_after),
                 retrain=at('retrain'), references=at('ref'), data=office.table,
                 people=','.join(office.asked), out=out, size=32, views=2,
                 steps=20, rate=.03) | given
    argv = [str(x) for k, v in words.items() for x in (f'--{k}', v)]
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = run(['audit', *argv])
    return status, said.getvalue() + wrong.getvalue(), out


@pytest.fixture(scope='module')
def reports(office):
    "Audits of Pretrain as the model after, and of Retrain."
    found = {}
    for after in ('before', 'retrain'):
        status, said, out = command(office, after)
        assert status == 0, said
        report = AuditReport.model_validate_json((out / 'audit.json').read_text())
        found[after] = report, (out / 'audit.html').read_text(), said
    return found


def test_pretrain_is_caught_by_attacks_and_relearning(reports):
    r, _, said = reports['before']
    verdicts = {k: a['verdict'] for k, a in r.attacks.items()}
    assert verdicts['loss_attack'] == verdicts['rmia_attack'] == 'remembered', verdicts
    assert r.relearning['verdict'] == 'remembered'
    assert r.headline.startswith('STILL KNOWN') and r.headline in said
    assert r.bystanders['after']['easier'] == 0, 'nothing changed'


def test_retrain_passes(reports):
    r = reports['retrain'][0]
    verdicts = {k: a['verdict'] for k, a in r.attacks.items()}
    assert verdicts['loss_attack'] == verdicts['rmia_attack'] == 'not found', verdicts
    assert r.relearning['verdict'] == 'not found'
    assert r.headline.startswith('NOT FOUND')
    auc = r.attacks['loss_attack']['models']
    assert auc['before']['auc_low'] > 80 and auc['after']['auc_low'] < 60


def test_the_report_is_complete_and_needs_nothing_else(reports, office):
    r, page, _ = reports['before']
    for title in ('Attacks', 'Person by person', 'Averages', 'Everybody else',
                  'Relearning on retained data alone', 'Not checked',
                  'Whose outputs', 'What no such report can say'): assert title in page
    for person in office.asked: assert person in page
    assert not re.search(r'(?i)\b(src|href)\s*=\s*["\']?\s*(https?:)?//', page)
    assert '<script' not in page and '<img' not in page and 'url(http' not in page
    assert page.count('<svg') == 1 and 'certificate' not in page.lower()
    assert 'complian' not in page.lower()
    needs = {x['what']: x['needs'] for x in r.not_checked}
    assert '--forgotten' in needs['U-LiRA'] and 'LiRA, offline' in needs
    assert len(r.files) == 3 and r.data['forget']['people'] == len(office.asked)
    assert len(r.people) == len(office.asked) and r.fpr == 10


def test_json_has_no_number_that_is_none(reports):
    text = reports['before'][0].model_dump_json()
    json.loads(text, parse_constant=lambda c: pytest.fail(c))


def said_by(*argv):
    "What a command prints; it must not fail."
    said = io.StringIO()
    with contextlib.redirect_stdout(said): status = run(list(map(str, argv)))
    assert status == 0, said.getvalue()
    return said.getvalue()


def test_an_audit_of_what_forget_wrote(office, tmp_path):
    f, kit, root = office.folder, tmp_path / 'kit', office.table.parent
    t = pd.read_csv(office.table, dtype=str)
    theirs = t[t.split == 'portrait']
    t[t.split != 'portrait'].to_csv(root / 'known.csv', index=False)
    quick = ['requests=2', 'calibration=1', 'start=2']
    said_by('prepare', '--model', f'{f}/net.py:net', '--weights',
            f / 'before.safetensors', '--data', root / 'known.csv', '--kit', kit,
            '--size', 32, '--requests', 3, '--turns', 1, '--set', *quick)
    said_by('forget', kit, *(root / p for p in theirs.path), '--out',
            f / 'forgotten.safetensors')
    status, said, out = command(office, 'forgotten', kit=kit, steps=0)
    assert status == 0, said
    r = AuditReport.model_validate_json((out / 'audit.json').read_text())
    done, = map(json.loads, (kit / 'ledger.jsonl').read_text().splitlines())
    assert done['after'] in r.files.values(), 'it is this model that was looked at'
    assert r.rehearsal['labels'] == done['labels'] != 'given'
    assert r.rehearsal['same_model'] and set(r.rehearsal['scores']) > {'own_score'}
    loss = {x['model']: x['loss'] for x in r.averages if x['set'] == 'portrait'}
    assert loss['after'] > loss['before'], 'a step was taken'
    assert len(r.people) == len(office.asked) == len(theirs)


BAD = [   # what is wrong, what the message names
    (dict(people='nobody'), ['staff.csv', '"nobody"', '--people']),
    (dict(fpr=.01), ['fpr = 0.01', 'needs 100', 'bring more controls']),
    (dict(fpr=2), ['fpr = 2', 'between 0 and 1']),
    (dict(after='gone.safetensors'), ['gone.safetensors', 'no such weights file']),
    (dict(retrain='old.pt'), ['old.pt', 'pickle', 'Convert']),
    (dict(references='gone.safetensors'), ['gone.safetensors', 'no such']),
    (dict(data='gone.csv'), ['gone.csv', 'no such file']),
    (dict(pair='one.safetensors'), ['--pair one.safetensors', 'two files']),
    (dict(steps=-1), ['steps', '-1']), (dict(rate=0), ['rate', '0']),
    (dict(views=0), ['views', '0']), (dict(people=','), ['people']),
    (dict(kit='nowhere'), ['nowhere', 'no kit']),
    (dict(model='timm:nothing_like_it'), ['nothing_like_it', 'no such architecture'])]


@pytest.mark.parametrize('given, says', BAD, ids=[str(b[0]) for b in BAD])
def test_bad_input_is_named_before_any_work(office, given, says):
    status, said, out = command(office, 'retrain', **given)
    assert status == 1 and not out.exists() and 'looking' not in said
    for words in says: assert words in said, said


def test_a_report_is_not_overwritten(office):
    (office.folder / 'mine').mkdir(exist_ok=True)
    (office.folder / 'mine/letter.txt').write_text('here')
    status, said, _ = command(office, 'retrain', out=office.folder / 'mine')
    assert status == 1 and 'exists already' in said and '--out' in said
    assert [*(office.folder / 'mine').iterdir()] == [office.folder / 'mine/letter.txt']


def test_headlines():
    told = dict(a=dict(title='Loss', verdict='blind'))
    assert headline(told, None).startswith('NOTHING CAN BE SAID')
    told['b'] = dict(title='RMIA', verdict='not found')
    assert 'NOT FOUND by 1 of 2' in headline(told, None)
    assert headline(told, dict(verdict='comes back')).startswith('STILL KNOWN')
    some = [dict(said='still known')] * 3 + [dict(said='as a stranger')] * 9
    assert 'SOME OF THEM: 3 of 12' in headline(told, None, some)
    assert headline(told, None, some[2:]).startswith('NOT FOUND'), 'as chance has it'
    told['b']['verdict'] = 'conspicuous'
    assert headline(told, None).startswith('KNOWN LESS THAN STRANGERS')
