from cluster.chaos.chaos_command import main

main()
