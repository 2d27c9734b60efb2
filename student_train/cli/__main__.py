"""Entry point of `python -m student_train.cli`, which `accelerate launch -m` needs."""

from student_train.cli import main

main()
