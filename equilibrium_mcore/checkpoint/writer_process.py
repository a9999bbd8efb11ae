"""A process that writes a rank's data files while the rank trains; `background.py` starts it.

It reads jobs from a pipe and answers each with what was written, or with the error. Tensors lie in
memory that both see. It ends when its rank does, in whatever way: the kernel kills it, or the
pipe ends. Signals that ask the job to stop are for the rank, which wants its last save written.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from equilibrium_mcore.checkpoint.data_files import DataFile, WrittenFile, write_data_file
from equilibrium_mcore.checkpoint.shared_buffer import SharedBuffer
from equilibrium_mcore.checkpoint.together import as_sent
from equilibrium_mcore.checkpoint.writer_jobs import FileToWrite, Removal, Reservation, WriteJob
from equilibrium_mcore.processes.parents import end_with_parent


def main(arguments: Sequence[str]) -> int:
    """Serve the pipe until it ends or says so.

    `arguments` are the parent's id and the descriptors of pipe and buffer.
    """
    parent, pipe, memory = map(int, arguments)
    end_with_parent(parent)
    connection, buffer = Connection(pipe), SharedBuffer(memory)
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            return 0
        if message is None:
            return 0
        if isinstance(message, Removal):  # what stays is removed by a later save
            shutil.rmtree(message.path, ignore_errors=True)
        elif isinstance(message, Reservation):
            buffer.find_pages(message.buffer_bytes)
        else:
            answer = _answer(message, buffer)
            try:
                connection.send(answer)
            except ConnectionError:
                return 0


def _answer(job: WriteJob, buffer: SharedBuffer) -> list[WrittenFile] | Exception:
    try:
        buffer.map_first(job.buffer_bytes)
        return [write_data_file(_data_file(file, buffer)) for file in job.files]
    except Exception as error:  # whatever it is, the rank has to hear of it
        return as_sent(error)


def _data_file(file: FileToWrite, buffer: SharedBuffer) -> DataFile:
    tensors = [(item, buffer.tensor(slot)) for item, slot in file.slots]
    return DataFile(Path(file.path), file.name, file.objects, tensors)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
