package pin

// ServicesDir is where the translation of Services at connect() is pinned on a node.
const ServicesDir = Dir + "/services"

// Names of maps in that directory. They are their names in the kernel as well.
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

// Names in that directory of the programs' links to the node's cgroup. They are the programs' names in the kernel as well.
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
