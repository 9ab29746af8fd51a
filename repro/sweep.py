"""Many runs on one machine: what frontier.py, family.py and iterative.py share.

A job is a dict of settings: `method`, `seed`, `common` (what all jobs of the sweep share, its `folder` among them) and
its own knobs. A worker process does it and writes its results to a file. So a sweep that was stopped goes on where it
stopped, and a job whose settings changed is done again.
"""
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError                                                                # noqa: E402


def path_of(job):
    """Where a job's results go, without the ending. Settings not in the name are in the file."""
    knobs = [f'{key}={value if isinstance(value, str) else format(value, "g")}' for key, value in sorted(job.items())
             if key not in ('method', 'seed', 'common')]
    return os.path.join(job['common']['folder'], f"seed-{job['seed']}", '-'.join([job['method'], *knobs]))


def result_of(job):
    """What the job's file says, or None where it is to be done."""
    try:
        with open(path_of(job) + '.json') as f:
            result = json.load(f)
        return result if result['job'] == job else None
    except (OSError, ValueError, KeyError):
        return None


def be_a_worker():
    """Leave the bars and Ctrl-C to the parent, and end when it does or says so, with all that was started here."""
    os.setpgrp()
    os.environ['TQDM_DISABLE'] = '1'
    parent = os.getppid()

    def end(*_):
        os.killpg(0, signal.SIGKILL)
    signal.signal(signal.SIGTERM, end)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        end()
    threading.Thread(target=watch, daemon=True).start()


def do(work, job, needed):
    """Do a job in its worker: work(job, needed) -> dict. It is written with the job and its seconds."""
    began = time.perf_counter()
    os.makedirs(path_of(job), exist_ok=True)
    result = {'job': job, **work(job, needed), 'seconds': time.perf_counter() - began}
    with open(path_of(job) + '.tmp', 'w') as f:
        json.dump(result, f)
    os.replace(path_of(job) + '.tmp', path_of(job) + '.json')
    return result


def sweep(jobs, workers, work, needs, summary):
    """Do the jobs that are not done yet, each after those it needs, `workers` at a time. -> all results, list of dict

    work(job, needed): a function of a module, run in a worker. needs(job, jobs): the jobs whose files this one reads;
    it gets them as `needed`. summary(result): a line on a finished one. A UserError of a worker ends the sweep.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)        # to say how far it came
    results = {path_of(job): result_of(job) for job in jobs}
    for job in jobs:            # what was made from something that is made again is made again
        if any(results[path_of(other)] is None for other in needs(job, jobs)):
            results[path_of(job)] = None
    pending, running = [job for job in jobs if results[path_of(job)] is None], {}
    signal.signal(signal.SIGINT, signal.default_int_handler)        # Ctrl-C says how far the sweep came
    print(f'{len(jobs)} runs, {len(jobs) - len(pending)} of them done before; {workers} at a time')
    spawn = multiprocessing.get_context('spawn')        # torch's threads do not survive a fork
    with (ProcessPoolExecutor(workers, spawn, be_a_worker) as pool,
          tqdm(total=len(pending), desc='runs', unit='run', disable=None, smoothing=0) as bar):
        try:
            while pending or running:
                ready = [job for job in pending if all(results[path_of(other)] for other in needs(job, jobs))]
                for job in ready[:workers - len(running)]:
                    pending.remove(job)
                    running[pool.submit(do, work, job, needs(job, jobs))] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    results[path_of(job)] = result = future.result()
                    tqdm.write(f'{path_of(job):90} {result["seconds"]:5.0f} s   {summary(result)}')
                    bar.update()
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                done = sum(result is not None for result in results.values())
                raise UserError(f'stopped with {done} of {len(jobs)} runs done; the same command goes on') from None
            if isinstance(error, UserError):        # as a worker sent it, its message stands in it twice
                raise UserError(f'{path_of(job)}: {error.message}') from None
            raise
    return [results[path_of(job)] for job in jobs]


def write_json(path, value):
    """Write JSON with a line for each record: each entry of a dict, each element of a list of dicts."""
    def lines_of(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return '[\n' + ',\n'.join(json.dumps(record) for record in value) + '\n]'
        return json.dumps(value)

    text = lines_of(value)
    if isinstance(value, dict):
        text = '{\n' + ',\n'.join(f'{json.dumps(str(key))}: {lines_of(entry)}' for key, entry in value.items()) + '\n}'
    with open(path, 'w') as f:
        f.write(text + '\n')


def write_report(out, text, value):
    """Write <out>.md, a text, and <out>.json, the numbers behind it; their folder is made."""
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    with open(out + '.md', 'w') as f:
        f.write(text)
    write_json(out + '.json', value)


def write_results(out, text, results):
    """Write <out>.md, the text, and <out>.json, what sweep gave, without what all jobs have in common."""
    jobs = [{**r, 'job': {k: v for k, v in r['job'].items() if k != 'common'}} for r in results]
    write_report(out, text, jobs)
