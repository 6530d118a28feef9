# The README's student and teacher are small ones, and its pictures are of digits.
import shutil
import subprocess
import sys
from pathlib import Path

from mmkd.shipped import TOOLS

counts = ['--train', '16', '--val', '16', '--test', '16']
command = [sys.executable, TOOLS / 'make_digits.py', *counts]
subprocess.run(command, check=True, capture_output=True)
Path('folder').mkdir()
for name, config in (('student', 'plain'), ('teacher', 'teacher')):
    Path(f'{name}.py').write_text(f"""\
_base_ = [__import__('mmkd').base('digits/{config}')]
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=12, convert_to_iter_based=True)]
""")
shutil.copy(TOOLS.parent / 'checkpoints/digits_teacher.pth', 'teacher.pth')
