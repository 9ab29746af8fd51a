"""Several processes: how they find one another, whether torchrun has restarted them, and which of them is lost.

sft.py, dpo.py and prepare_prefs.py share this file, since it is what all ranks must agree on. torchrun sets RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT; with --max-restarts it starts all processes again, by the same command, when one
dies. Its store outlives them: plain init_process_group then reads the addresses of the dead there and hangs (torch 2.13).
"""
import math
import os
import re
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError


def read_ranks(device_type):
    """world, rank, local_rank from the environment, 1, 0, 0 for a single process; UserErrors where they cannot work."""
    try:
        world, rank, local_rank, local_world, _ = (int(os.environ.get(key, default)) for key, default in (
            ('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0), ('LOCAL_WORLD_SIZE', 1), ('MASTER_PORT', 0)))
    except ValueError as error:
        raise UserError(f'one of WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT in the environment: {error}') from None
    missing = [key for key in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') + ('LOCAL_RANK',) * (device_type == 'cuda')
               if world > 1 and not os.environ.get(key)]
    if missing:
        raise UserError(f'WORLD_SIZE={world} but {", ".join(missing)} not set: start with torchrun, which sets them all')
    if not 0 <= rank < world:
        raise UserError(f'RANK={rank} is not of WORLD_SIZE={world}: start with torchrun, which sets both')
    copies = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
    if 'WORLD_SIZE' not in os.environ and copies != '1':
        raise UserError(f'srun started {copies} processes that know nothing of one another: let it start torchrun, once a '
                        'node, as in repro/slurm.sh')
    here, gpus = max(local_world, local_rank + 1), torch.cuda.device_count()
    if device_type == 'cuda' and here > gpus:
        raise UserError(f'{here} process{"es" * (here > 1)} on this machine, but torch sees {gpus} GPUs: lower --nproc_per_node, '
                        'or --device=cpu')
    if device_type == 'cuda' and world > 1 and not dist.is_nccl_available():
        raise UserError(f'{world} processes on GPUs need NCCL, which this torch ({torch.__version__}) was built without: '
                        'install one with it, or run one process, or --device=cpu')
    if device_type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('device=mps is not available here: --device=cpu')
    return world, rank, local_rank


def join(world, rank, backend, timeout):
    """Wait for all ranks, and make them a process group where they are several.

    backend: of init_process_group; timeout: seconds to wait for the others. -> store, what the ranks of this attempt share;
    launch, the id of what torchrun started, the same after a restart; restarted, whether this is one. UserErrors say who is missing.
    """
    if world == 1 and 'TORCHELASTIC_RUN_ID' not in os.environ:
        return None, '', False
    store, group, launch = _meet(world, rank, timeout)
    store = dist.PrefixStore(group, store)
    if world > 1:
        try:
            dist.init_process_group('gloo', store=dist.PrefixStore('trial', store), rank=rank, world_size=world,
                                    timeout=timedelta(seconds=timeout / 5))     # gloo waits five times that to connect
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        except RuntimeError as error:
            why = str(error).splitlines()[0][:200]
            raise UserError(f'all {world} ranks came, but they cannot connect to one another ({why}): '
                            'set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that the nodes share') from None
    return store, launch, launch != group


def _meet(world, rank, timeout):
    """Wait until all ranks have come to rank 0. -> store, the name of this attempt in it, and that of the launch's first."""
    address, until, note = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])), time.monotonic() + timeout, time.monotonic() + 10
    advice = (f'start the same command on every node, with MASTER_ADDR={address[0]} and MASTER_PORT={address[1]}, where rank 0 is; '
              'does a firewall let it through? --join_timeout waits longer')
    hosts_store = rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
    while not hosts_store:
        try:
            socket.create_connection(address, 5).close()        # the store's own tries print a C++ stack each
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(f'rank 0 does not answer ({error}): {advice}') from None
            time.sleep(0.2)
    try:
        store = dist.TCPStore(*address, is_master=hosts_store, wait_for_workers=False,
                              timeout=timedelta(seconds=timeout + 10 * (rank > 0)))
        me = uuid.uuid4().hex           # a rank of an earlier attempt had another
        if rank:
            store.set(f'hello {rank}', me)
            group = store.get(me).decode()
            store.set(f'{group} {rank}', '')
            launch = store.get(f'{group} go').decode()
            if ' ' in launch:           # what is wrong instead
                raise UserError(launch)
            return store, group, launch
        here = {0}
        while missing := sorted(set(range(world)) - here):
            for r in missing:
                if store.check([f'{me} {r}']):
                    here.add(r)
                elif store.check([f'hello {r}']):
                    store.set(store.get(f'hello {r}').decode(), me)
            came = f'{len(here)} of {world} ranks came, missing {", ".join(map(str, missing))}'
            if time.monotonic() > until:
                store.set(f'{me} go', error := f'{came} after {timeout} s: {advice}')
                raise UserError(error)
            if time.monotonic() > note:
                note = math.inf
                print(f'waiting: {came}', flush=True)
            time.sleep(0.02)
        launch = store.compare_set('launch', '', me).decode()       # the first attempt's stays
        store.set(f'{me} go', launch)
        return store, me, launch
    except RuntimeError as error:
        raise UserError(f'the ranks cannot meet ({str(error).splitlines()[0][:200]}): {advice}') from None


def check_alike(facts):
    """UserError where a rank has other facts than rank 0: {what: a value}, of a command and of what it read."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for other, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0].get(key):
                raise UserError(f'rank {other} has another {key} than rank 0 ({value!r}, not {everyone[0].get(key)!r}): all '
                                'nodes need the same command, and the same data/ and out/, on a shared disk or copied')


def name_lost_ranks(store, world, rank, where):
    """From here on, one line where another rank is lost, by the first one left; the traceback of anything else.

    where: a function, '' or ' at step 8' by now.
    """
    before = sys.excepthook

    def on_error(kind, error, trace):
        broken = re.search(r'closed by peer|reset by peer|refused|broken pipe|time[d ]*out|remote process exited', str(error), re.I)
        if not issubclass(kind, RuntimeError) or not broken:
            return before(kind, error, trace)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun's, which ends what is left
        try:
            store.set(f'alive {rank}', '')
            time.sleep(2)               # the others find out, too
            alive = [r for r in range(world) if store.check([f'alive {r}'])]
        except RuntimeError:
            alive = list(range(1, world))       # rank 0 held the store
        if len(alive) == world:
            return before(kind, error, trace)
        if rank == alive[0]:
            left = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) - int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
            gone = ', '.join(str(r) for r in range(world) if r not in alive)
            print(f'error: no answer from rank {gone}{where()} ({broken[0]}): it died, or the network did; its own last '
                  f'lines say why; {"torchrun starts all again" if left > 0 else "start it again, a training run with --resume"}', file=sys.stderr, flush=True)
        os._exit(1)     # and wait for nobody

    sys.excepthook = on_error
