// Package ruleset puts the network's nftables tables into the kernel: one table of family inet for each concern, in
// which every set and rule has a comment that says what it is for. What changes with the cluster is in sets, so that
// a change is one of elements; rules change only with Fathom's version.
package ruleset

import (
	"fmt"
	"os"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// Ruleset is the nftables of a network namespace. It is for one goroutine at a time, and what begins with Holds for another.
type Ruleset struct {
	file     *os.File
	conn     *nftables.Conn
	socket   *socket
	known    map[string]known // by table
	mu       sync.Mutex       // of services
	services heldServices
}

// known is what a table held at a generation of the kernel's whole rule set.
type known struct {
	variant    string
	generation uint32
	elements   elements
}

// sendBytes is room for a transaction of all elements of a large cluster.
const sendBytes = 64 << 20

// Open opens the rule set of the namespace at path, such as /proc/self/ns/net.
func Open(path string) (*Ruleset, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	r := &Ruleset{file: file, known: map[string]known{}}
	if r.socket, err = openSocket(int(file.Fd())); err != nil {
		file.Close()
		return nil, fmt.Errorf("open nftables of %s: %w", path, err)
	}
	r.conn, err = nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(file.Fd())),
		nftables.WithSockOptions(func(c *netlink.Conn) error { return c.SetWriteBuffer(sendBytes) }))
	if err != nil {
		r.socket.close()
		file.Close()
		return nil, fmt.Errorf("open nftables of %s: %w", path, err)
	}
	return r, nil
}

// beside opens the same rule set once more, to read it while another goroutine uses this one.
func (r *Ruleset) beside() (*Ruleset, error) {
	return Open(fmt.Sprintf("/proc/self/fd/%d", r.file.Fd()))
}

// Close closes the rule set. The tables stay.
func (r *Ruleset) Close() {
	_ = r.conn.CloseLasting()
	r.socket.close()
	r.file.Close()
}

// Delete takes one of our tables away. One that is not there is not an error.
func (r *Ruleset) Delete(name string) error {
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	delete(r.known, name)
	r.conn.AddTable(table) // so that the deletion after it does not fail
	r.conn.DelTable(table)
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("delete nftables table inet %s: %w", name, err)
	}
	return nil
}
