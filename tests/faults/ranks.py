"""Start the processes of a run as torchrun does, kill one, and print what became of all.

    ranks.py COUNT VICTIM MARKER FOLDER WORDS...

The victim is a rank, which gets SIGKILL after rank 0 has written a line that contains the marker. What each
says goes into FOLDER/0, FOLDER/1 and so on; in WORDS, `{rank}` and `{port}` become the numbers. Printed is,
as JSON, each rank's status and after how many seconds it was seen to have ended.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from forked import _execute


def main() -> None:
    count, victim, marker, folder, *words = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    reader, writer = os.pipe()
    ranks = {}
    for rank in map(str, range(int(count))):
        child = os.fork()
        if child == 0:
            said = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT) if rank != "0" else writer
            for number in (1, 2):
                os.dup2(said, number)
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = [word.replace("{rank}", rank).replace("{port}", str(port)) for word in words]
            _execute(sys.argv[0])  # what it raises ends the process as it would without us
            return
        ranks[child] = rank
    os.close(writer)
    killed = None
    with open(reader) as said, open(f"{folder}/0", "w") as file:
        for line in said:
            file.write(line)
            if killed is None and marker in line:
                os.kill(next(child for child, rank in ranks.items() if rank == victim), signal.SIGKILL)
                killed = time.monotonic()
    ends = {}
    while ranks:
        child, status = os.wait()
        ends[ranks.pop(child)] = os.waitstatus_to_exitcode(status), killed and time.monotonic() - killed
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
