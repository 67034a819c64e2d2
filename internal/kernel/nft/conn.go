package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// Conn is the nftables of a network namespace, by netlink. It is for one goroutine at a time.
type Conn struct {
	file    *os.File
	library *nftables.Conn // which reads rules
	fd      int
	answer  []byte // room for what the kernel says
}

// sendBytes is room for a transaction of all elements of a large cluster.
const sendBytes = 64 << 20

// nfgenmsg is the size of the header that follows netlink's own.
const nfgenmsg = 4

// Open opens the rule set of the network namespace at path, such as /proc/self/ns/net.
func Open(path string) (*Conn, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	c := &Conn{file: file, fd: -1}
	if c.fd, err = openSocket(int(file.Fd())); err == nil {
		c.library, err = nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(file.Fd())))
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open nftables of %s: %w", path, err)
	}
	return c, nil
}

// Beside opens the same rule set once more.
func (c *Conn) Beside() (Kernel, error) { return Open(fmt.Sprintf("/proc/self/fd/%d", c.file.Fd())) }

// Close closes the rule set. The tables stay.
func (c *Conn) Close() {
	if c.library != nil {
		_ = c.library.CloseLasting()
	}
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
	c.file.Close()
}

func openSocket(ns int) (int, error) {
	fd := -1
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: a thread that changed its namespace is not used again
		err := unix.Setns(ns, unix.CLONE_NEWNET)
		if err == nil {
			fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	// Whom the limit of all sockets binds may have room enough all the same.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBytes) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBytes)
	}
	return fd, nil
}

func (c *Conn) send(b []byte) error {
	return unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// receive takes messages until f has seen enough, or an error such as EAGAIN.
func (c *Conn) receive(flags int, f func(kind uint16, sequence uint32, payload []byte) bool) error {
	if c.answer == nil {
		c.answer = make([]byte, 64<<10)
	}
	for {
		size, _, err := unix.Recvfrom(c.fd, c.answer, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for m, err := range nlmsg.Messages(c.answer[:size]) {
			if err != nil || !f(m.Kind, m.Seq, m.Body) {
				return err
			}
		}
	}
}

// errnoOf is what the kernel says in a message of an error. One that is cut short is an error, too.
func errnoOf(payload []byte) unix.Errno {
	if len(payload) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
}

// ask sends a request, and hands over the attributes of each object in the answer: one, or with NLM_F_DUMP all.
func (c *Conn) ask(kind, flags uint16, attributes func(*messages), f func(attributes []byte)) error {
	request := &messages{}
	at := request.message(kind, flags, "")
	attributes(request)
	request.close(at)
	if err := c.send(request.buf); err != nil {
		return err
	}
	var failed error
	err := c.receive(0, func(kind uint16, _ uint32, payload []byte) bool {
		switch {
		case kind == unix.NLMSG_DONE:
			return false
		case kind == unix.NLMSG_ERROR && len(payload) >= 4:
			failed = errnoOf(payload)
			return false
		case len(payload) >= nfgenmsg:
			f(payload[nfgenmsg:])
		}
		return flags&unix.NLM_F_DUMP != 0
	})
	return errors.Join(failed, err)
}

// Generation asks the kernel for the number of its rule set. The kernel does not tell of dumps that a transaction
// interrupted: a dump is taken as true only if the number is the same before and after.
func (c *Conn) Generation() (generation uint32, err error) {
	found := false
	err = c.ask(unix.NFT_MSG_GETGEN, 0, func(*messages) {}, func(b []byte) {
		nlmsg.Attrs(b, func(kind uint16, data []byte) {
			if kind == unix.NFTA_GEN_ID && len(data) == 4 {
				generation, found = binary.BigEndian.Uint32(data), true
			}
		})
	})
	if err == nil && !found {
		err = errors.New("the kernel's answer has none")
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of the rule set: %w", err)
	}
	return generation, nil
}

// Commit makes the changes. The kernel answers while it is being told, so that every answer is there afterwards.
func (c *Conn) Commit(x Transaction) error {
	t, err := encode(x)
	if err != nil {
		return err
	}
	return c.commit(t)
}

func (c *Conn) commit(t *messages) error {
	last := uint32(len(t.objects)) - 1
	flags := t.buf[t.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	t.close(t.frame(unix.NFNL_MSG_BATCH_END, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0, "commit the transaction"))
	if err := c.send(t.buf); err != nil {
		return fmt.Errorf("send a transaction of %d bytes: %w", len(t.buf), err)
	}
	var failed error
	acknowledged := false
	err := c.receive(unix.MSG_DONTWAIT, func(kind uint16, sequence uint32, payload []byte) bool {
		if kind != unix.NLMSG_ERROR || len(payload) < 4 {
			return true
		}
		switch errno := errnoOf(payload); {
		case errno == 0:
			acknowledged = acknowledged || sequence == last
		case failed == nil:
			about := "the transaction"
			if int(sequence) < len(t.objects) {
				about = t.objects[sequence]
			}
			failed = fmt.Errorf("%s: %w", about, errno)
		}
		return true
	})
	switch {
	case failed != nil:
		return failed
	case err != nil && !errors.Is(err, unix.EAGAIN):
		return err
	case !acknowledged:
		return errors.New("the kernel did not acknowledge the transaction")
	}
	return nil
}

// Each hands over the elements of a set.
func (c *Conn) Each(table string, s *Set, yield func(Element)) error {
	var bounds []bound
	err := c.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, func(t *messages) {
		t.text(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		t.text(unix.NFTA_SET_ELEM_LIST_SET, s.Name)
	}, func(b []byte) {
		eachElement(b, func(e bound) {
			if s.isPaired() {
				bounds = append(bounds, e)
			} else {
				yield(e.Element)
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return errStrange
	}
	if err != nil {
		return fmt.Errorf("read the set %s: %w", s.Name, err)
	}
	list, ok := intervals(bounds)
	if !ok {
		return errStrange
	}
	for _, e := range list {
		yield(e)
	}
	return nil
}

func eachElement(b []byte, yield func(bound)) {
	nlmsg.Attrs(b, func(kind uint16, data []byte) {
		if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			nlmsg.Attrs(data, func(_ uint16, e []byte) { yield(elementOf(e)) })
		}
	})
}

// Find asks for one element by its key.
func (c *Conn) Find(table string, s *Set, e Element) (have Element, found bool, err error) {
	err = c.ask(unix.NFT_MSG_GETSETELEM, 0, func(t *messages) {
		t.text(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		t.text(unix.NFTA_SET_ELEM_LIST_SET, s.Name)
		list := t.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		t.element(bound{Element: e}, false)
		t.unnest(list)
	}, func(b []byte) { eachElement(b, func(e bound) { have, found = e.Element, true }) })
	if errors.Is(err, unix.ENOENT) {
		return have, false, nil
	}
	if err != nil {
		return have, false, fmt.Errorf("ask for an element of the set %s: %w", s.Name, err)
	}
	return have, found, nil
}

// HasSets compares all but the comments.
func (c *Conn) HasSets(table Table) (bool, error) {
	type shape struct{ flags, keyType, keySize, dataType, dataSize uint32 }
	have := map[string]shape{}
	err := c.ask(unix.NFT_MSG_GETSET, unix.NLM_F_DUMP, func(t *messages) { t.text(unix.NFTA_SET_TABLE, table.Name) }, func(b []byte) {
		var name string
		var s shape
		nlmsg.Attrs(b, func(kind uint16, data []byte) {
			to := map[uint16]*uint32{unix.NFTA_SET_FLAGS: &s.flags, unix.NFTA_SET_KEY_TYPE: &s.keyType, unix.NFTA_SET_KEY_LEN: &s.keySize,
				unix.NFTA_SET_DATA_TYPE: &s.dataType, unix.NFTA_SET_DATA_LEN: &s.dataSize}[kind]
			switch {
			case kind == unix.NFTA_SET_NAME && len(data) > 0:
				name = string(data[:len(data)-1])
			case to != nil && len(data) == 4:
				*to = binary.BigEndian.Uint32(data)
			}
		})
		if s.dataType == unix.NFT_DATA_VERDICT {
			s.dataSize = 0 // the kernel's own matter
		}
		have[name] = s
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list the sets: %w", err)
	}
	want := map[string]shape{}
	for _, s := range table.Sets {
		made := shape{flags: s.flags(), keyType: s.Key.GetNFTMagic(), keySize: s.Key.Bytes}
		if s.isMap() {
			made.dataType, made.dataSize = s.dataType()
		}
		want[s.Name] = made
	}
	return maps.Equal(have, want), nil
}

// HasChains compares chains, and what their rules do.
func (c *Conn) HasChains(table string, chains []Chain) (bool, error) {
	in := &nftables.Table{Family: nftables.TableFamilyINet, Name: table}
	have, err := c.library.ListChainsOfTableFamily(in.Family)
	if err != nil {
		return false, fmt.Errorf("list the chains: %w", err)
	}
	have = slices.DeleteFunc(have, func(c *nftables.Chain) bool { return c.Table.Name != in.Name })
	want := map[string]Chain{}
	for _, c := range chains {
		want[c.Name] = c
	}
	if len(have) != len(want) {
		return false, nil
	}
	for _, h := range have {
		w, found := want[h.Name]
		if !found || h.Type != w.Kind || !reflect.DeepEqual(h.Hooknum, w.Hook) || !reflect.DeepEqual(h.Priority, w.Priority) ||
			h.Policy != nil && *h.Policy != nftables.ChainPolicyAccept {
			return false, nil
		}
		rules, err := c.library.GetRules(in, h)
		if err != nil {
			return false, fmt.Errorf("list the chain %s: %w", h.Name, err)
		}
		if !slices.EqualFunc(rules, w.Rules, isRule) {
			return false, nil
		}
	}
	return true, nil
}

// isRule says whether a rule of the kernel's is the one that we would make.
func isRule(have *nftables.Rule, want Rule) bool {
	if comment := commentOf(have.UserData, userdata.TypeComment); comment != want.Comment {
		return false
	}
	return slices.EqualFunc(have.Exprs, want.Exprs, func(a, b expr.Any) bool {
		switch x := a.(type) { // the sets' numbers are the kernel's own
		case *expr.Lookup:
			named := *x
			named.SetID = 0
			a = &named
		case *expr.Dynset:
			named := *x
			named.SetID = 0
			if len(named.Exprs) == 0 {
				named.Exprs = nil
			}
			a = &named
		case *expr.Counter: // packets change it
			a = &expr.Counter{}
		}
		return reflect.DeepEqual(a, b)
	})
}
