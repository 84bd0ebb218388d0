from cluster.chaos.command import main

main()
