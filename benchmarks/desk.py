"""Time and memory of one request at the desk, relative to a training step of 32 images.

Both on the same model and in the same run, each in a process of its own.
"""

import resource
import subprocess
import sys
import time

import torch

from oneshui.handlers import Classifier, build
from oneshui.methods import METHODS
from oneshui.metastep import PerTensor
from oneshui.metaunlearn import stored
from oneshui.metrics import task_loss
from oneshui.vit import SupportSet

MODELS = {'torchvision:resnet18': 96, 'timm:vit_tiny_patch16_224': 224}
megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def training_step(model, size):
    "Forward, backward, SGD with momentum."
    opt = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x, y = torch.randn(32, 3, size, size), torch.zeros(32, dtype=torch.int64)
    return lambda: (opt.zero_grad(), task_loss(model(x), y).backward(), opt.step())


def request(model, size):
    "What MetaStep does with one portrait, one size for each tensor."
    H = PerTensor().make(model)
    H.total.data.fill_(-5)
    S = SupportSet(torch.randn(1, 3, size, size), torch.zeros(1, dtype=torch.int64))
    hyper = dict(simulated_size=1, sizes='tensor')
    return lambda: METHODS['metastep'].unlearn(model, S, stored(H=H), hyper)


def measured(name, what):
    "Seconds (best of three), and megabytes beyond the model itself."
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = build(name, {}, 8)[0].eval()
    do = dict(training=training_step, request=request)[what](
        Classifier(net, None), MODELS[name])
    before, took = megabytes(), []
    for _ in range(3):
        t = time.perf_counter()
        do()
        took.append(time.perf_counter() - t)
    print(min(took), megabytes() - before)


if __name__ == '__main__':
    if len(sys.argv) > 1:
        measured(*sys.argv[1:])
        sys.exit()
    for name, size in MODELS.items():
        found = {}
        for what in ('training', 'request'):
            line = [sys.executable, __file__, name, what]
            said = subprocess.run(line, capture_output=True, text=True, check=True)
            found[what] = [float(x) for x in said.stdout.split()]
        (t, m), (t_r, m_r) = found['training'], found['request']
        print(
            f'{name} at {size} px: a training step {t:.2f} s, {m:.0f} MB; a request '
            f'{t_r:.2f} s, {m_r:.0f} MB: {t_r / t:.2f} and {m_r / m:.2f} of it'
        )
