"""The layout is the architecture: who imports whom, and what training needs."""
import ast
import subprocess
import sys

from conftest import ROOT

STAGES = ['prepare_prefs', 'sft', 'dpo', 'sample']
PRODUCT = [*(ROOT / f'{stage}.py' for stage in STAGES), ROOT / 'model.py', ROOT / 'config' / '__init__.py',
           *(ROOT / 'nanodpo').glob('*.py')]
OURS = {*STAGES, 'model', 'config', 'nanodpo', 'repro', 'tests'}


def imports(path):
    """The modules that a file imports anywhere in it, whole names: set of str."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names


def test_imports_go_one_way():
    for path in PRODUCT:
        roots = {name.partition('.')[0] for name in imports(path)} & OURS
        allowed = set() if path.stem in ('model', '__init__') else {'config', 'model', 'nanodpo'}
        assert roots <= allowed, f'{path.name} imports {roots}'


def test_the_shared_modules_form_no_circle():
    modules = {path.stem: path for path in (ROOT / 'nanodpo').glob('*.py')}
    needs = {name: {other for other in modules if f'nanodpo.{other}' in imports(path)}
             for name, path in modules.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f'these import one another: {sorted(needs)}'
        for name in free:
            del needs[name]


def test_no_assert_guards_the_product():
    for path in PRODUCT:
        nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        lines = [node.lineno for node in nodes if isinstance(node, ast.Assert)]
        assert not lines, f'{path.name}: python -O would drop the checks in lines {lines}'


ONLY_TRAINING = '''
import builtins, sys
real = builtins.__import__
def gate(name, globals=None, locals=None, fromlist=(), level=0):
    outer = (globals or {{}}).get('__name__', '')
    if level == 0 and name.partition('.')[0] in ({missing}) and outer.partition('.')[0] in ({ours}):
        raise ImportError(f'{{name}} is not installed')
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = gate
sys.path.insert(0, {root!r})
import sft, dpo
sft.main(['--name=tiny', '--init_from=scratch', '--max_steps=1', '--n_layer=1', '--n_head=2', '--n_embd=8'])
dpo.main(['--name=tiny', '--max_steps=1'])
'''


def test_training_needs_only_torch_numpy_and_tqdm(experiment):
    missing = ['tiktoken', 'regex', 'datasets', 'tokenizers', 'safetensors', 'huggingface_hub', 'wandb', 'transformers']
    ours = ['sft', 'dpo', 'model', 'config', 'nanodpo', '__main__']
    code = ONLY_TRAINING.format(missing=repr(missing)[1:-1], ours=repr(ours)[1:-1], root=str(ROOT))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'done: out/tiny/dpo' in done.stdout, done.stderr
