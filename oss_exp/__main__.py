from oss_exp.cli import main

main()
