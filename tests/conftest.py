"What holds for every test: no network beyond this machine, one thread a process, figures without a screen."
import ipaddress, os, socket
import pytest

# before torch, transformers or matplotlib are imported anywhere, and inherited by every process that a test starts
for name, value in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1', MPLBACKEND='agg').items():
    os.environ.setdefault(name, value)

def _here(address:object)->bool:
    "Whether a socket's address is on this machine: a Unix socket, or the loopback device by name or number"
    if not isinstance(address, tuple): return True
    if address[0] in ('', 'localhost'): return True
    try: return ipaddress.ip_address(address[0]).is_loopback
    except ValueError: return False

@pytest.fixture(scope='session', autouse=True)
def no_network():
    "A test that reaches for another host fails, rather than passing only where there is a network"
    real = {name: getattr(socket.socket, name) for name in ('connect', 'connect_ex')}
    def guard(name:str):
        def method(self, address):
            if not _here(address): raise RuntimeError(f'a test tried to reach {address}: tests use no network')
            return real[name](self, address)
        return method
    with pytest.MonkeyPatch.context() as patch:
        for name in real: patch.setattr(socket.socket, name, guard(name))
        yield

# files of a minute and more, longest first: started last, one of them would keep one process busy while the others have nothing left to do
SLOW = ('test_site', 'test_cli', 'test_kernels_path', 'test_kernels_log_linear', 'test_kernels_flashformer', 'test_kernels_path_code', 'test_kernels_log_linear_code', 'test_flashformer', 'test_kernels_flashformer_code', 'test_project', 'test_duality_results', 'test_duality_distributed',
        'test_core_chat', 'test_rlcr_train')

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))

def pytest_terminal_summary(terminalreporter):
    "What tests want a person to see, `record_property('told', line)`; it comes through from other processes too"
    done = [r for reports in terminalreporter.stats.values() for r in reports if getattr(r, 'when', '') == 'call']
    lines = [line for r in done for name, line in r.user_properties if name == 'told']
    if lines: terminalreporter.section('registers spilled: bytes a thread, stored and loaded')
    for line in lines: terminalreporter.write_line(line)
