import json
import os
import subprocess
import sys

from ppdiffusers_train.cpu.environment import SETTINGS

REPORT = (
    "import os, sys, json; before = dict(os.environ); import ppdiffusers_train; "
    "print(json.dumps([{k: v for k, v in os.environ.items() if before.get(k) != v}, 'paddle' in sys.modules, "
    "'zlib' in sys.modules]))"
)


def import_in_a_new_process(code=REPORT, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLOG_minloglevel")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_import_sets_threads_silently_and_without_paddle():
    changed, has_paddle, has_zlib = import_in_a_new_process()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert changed.pop("MKL_NUM_THREADS") == str(cores)
    assert changed.pop("GLOG_minloglevel") == "1"
    assert set(changed) <= {"MKL_DEBUG_CPU_TYPE"} and not has_paddle and has_zlib


def test_what_the_user_has_set_stays():
    assert "MKL_NUM_THREADS" not in import_in_a_new_process(MKL_NUM_THREADS="1")[0]
    assert "MKL_NUM_THREADS" not in import_in_a_new_process(OMP_NUM_THREADS="1")[0]
    assert "MKL_DEBUG_CPU_TYPE" not in import_in_a_new_process(MKL_DEBUG_CPU_TYPE="1")[0]
    assert "GLOG_minloglevel" not in import_in_a_new_process(GLOG_minloglevel="0")[0]


def test_the_engine_of_encoders_gets_the_threads_of_products():
    code = "import ppdiffusers_train, paddle, json; from ppdiffusers_train.cpu.environment import configured_threads; "
    code += "print(json.dumps(configured_threads()))"
    assert import_in_a_new_process(code, MKL_NUM_THREADS="3") == 3
    assert import_in_a_new_process(code, OMP_NUM_THREADS="1") == 1


def test_local_ranks_share_the_cores():
    assert import_in_a_new_process(PADDLE_LOCAL_SIZE="1000")[0]["MKL_NUM_THREADS"] == "1"


def test_amd_processors_get_the_fast_path_of_mkl(monkeypatch):
    from ppdiffusers_train.cpu import environment as cpu

    for vendor, expected in (("AuthenticAMD", "5"), ("GenuineIntel", None)):
        monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # so that it is put back as it was, even where it was not set
        monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
        monkeypatch.setattr(cpu, "cpu_vendor", lambda vendor=vendor: vendor)
        monkeypatch.delitem(sys.modules, "paddle", raising=False)
        cpu.prepare_cpu()
        assert os.environ.get("MKL_DEBUG_CPU_TYPE") == expected


def test_nothing_is_set_when_paddle_is_already_there():
    code = "import sys, types; sys.modules['paddle'] = types.ModuleType('paddle'); " + REPORT
    assert import_in_a_new_process(code)[0] == {}
