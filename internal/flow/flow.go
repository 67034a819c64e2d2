// Package flow lists and ends what the kernel remembers of flows: entries of connection tracking, and sockets.
package flow
