"""Fine-tuning and distillation of text-to-image diffusion models on PaddlePaddle, on top of ppdiffusers.

Import this package before `paddle`: it prepares the processor's threads and libraries, which Paddle reads only once,
while it is being imported, and has PaddleNLP imported without what nobody needs of it. Nothing that is already set in
the environment is touched, and nothing is printed. In a process that Paddle's launcher has started, the first thing is
that secrets are masked in what the launcher has written of the environment; then it goes on in a child (`stand_in.py`).
"""

from ppdiffusers_train.cpu.environment import prepare_cpu
from ppdiffusers_train.launcher.stand_in import leave_stand_in
from ppdiffusers_train.launcher.tokens import scrub_launcher_logs, take_over
from ppdiffusers_train.runtime.light_paddlenlp import import_paddlenlp_lightly

scrub_launcher_logs()
take_over()
leave_stand_in()
prepare_cpu()
import_paddlenlp_lightly()

__version__ = "0.1.0"
