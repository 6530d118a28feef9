# Small pictures stand in for a folder of yours: digits up to 4 are the bolts, the others the nuts.
import json
import shutil
import subprocess
import sys
from pathlib import Path

from mmkd.shipped import TOOLS

counts = ['--train', '96', '--val', '40', '--test', '40']
command = [sys.executable, TOOLS / 'make_digits.py', '--out', 'digits', *counts]
subprocess.run(command, check=True, capture_output=True)
Path('parts/images').mkdir(parents=True)
for split in ('train', 'val', 'test'):
    labels = json.loads(Path(f'digits/{split}.json').read_text())
    digit = {each['id']: int(each['name']) for each in labels['categories']}
    labels['categories'] = [{'id': 1, 'name': 'bolt'}, {'id': 2, 'name': 'nut'}]
    for box in labels['annotations']:
        box['category_id'] = 1 + (digit[box['category_id']] > 4)
    for image in labels['images']:
        name = f'{split}_{image["file_name"]}'
        shutil.copy(f'digits/{split}/{image["file_name"]}', f'parts/images/{name}')
        image['file_name'] = name
    Path(f'parts/{split}.json').write_text(json.dumps(labels))

# Small networks stand in for those of the zoo, with weights that know digits.
Path('zoo').mkdir()
for name in ('teacher', 'student_backbone'):
    shutil.copy(TOOLS.parent / f'checkpoints/digits_{name}.pth', f'zoo/{name}.pth')
Path('small.py').write_text("""\
_base_ = [
    __import__('mmkd').base('digits/_base_/detector'),
    __import__('mmkd').base('digits/_base_/data'),
    __import__('mmkd').base('digits/_base_/schedule'),
]
model = dict(backbone=dict(base_channels=32), neck=dict(in_channels=[32, 64, 128]))
auto_scale_lr = dict(base_batch_size=8)
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=12, convert_to_iter_based=True)]
""")
