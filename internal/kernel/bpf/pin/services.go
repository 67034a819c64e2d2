package pin

// ServicesDir is where the balancing of Services at connect() is pinned on a node.
const ServicesDir = Dir + "/services"

// Names in that directory, of maps. The kernel knows them by these names too.
const (
	Services = "fathom_services"
	Backends = "fathom_backends"
	Affinity = "fathom_affinity"
	Peers    = "fathom_peers"
	Clients  = "fathom_clients"
	Talks    = "fathom_talks"
	Node     = "fathom_node"
	Connects = "fathom_connects"
)

// Names in that directory, of links of programs to the node's cgroup. The kernel knows the programs by these names.
const (
	Connect4 = "fathom_connect4"
	Connect6 = "fathom_connect6"
	Sendmsg4 = "fathom_sendmsg4"
	Sendmsg6 = "fathom_sendmsg6"
	Recvmsg4 = "fathom_recvmsg4"
	Recvmsg6 = "fathom_recvmsg6"
	Getpeer4 = "fathom_getpeer4"
	Getpeer6 = "fathom_getpeer6"
	Release  = "fathom_release"
)
