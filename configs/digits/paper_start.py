# The paper's recipe, from the teacher's neck and heads.
_base_ = 'paper.py'

model = dict(distillation=dict(start='teacher'))
