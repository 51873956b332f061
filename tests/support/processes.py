"Processes for tests, forked from one that has imported what they use: that takes longer than most of them run."
import multiprocessing, os, socket

fresh = multiprocessing.get_context('forkserver')
fresh.set_forkserver_preload(['fastai.vision.all', 'nbdev.test', 'nbdev.showdoc', 'sklearn.datasets', 'kd_fastai.all',
                              'transformers.models.vit.modeling_vit'])

def run_processes(target, *arguments, seconds=300):
    "Run `target(*args)` in a process of its own for each tuple of arguments, all at once, and return the exit codes"
    processes = [fresh.Process(target=target, args=args) for args in arguments]
    for p in processes: p.start()
    try:
        for p in processes: p.join(seconds)
    finally:
        for p in processes: p.kill()
    for p in processes: p.join()
    return [p.exitcode for p in processes]

def free_port():
    "Return the number of a port on which nothing listens"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def join_group(rank, ranks, port):
    "Tell the libraries which process of a group this one is"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
