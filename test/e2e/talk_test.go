package e2e

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands that have something go through the network all the time.
//
//	talk [-udp] [-at HOST:PORT -port PORT] FROM TO[,TO…] N
//	                      N flows from one pod to another, on each of which a few bytes go there and back all the time,
//	                      until the scenario ends; the test does so itself, in the pods' network namespaces, so that it
//	                      depends on nothing but the network. With -at they go to a Service that leads to port PORT of
//	                      all TO. FROM may be "-", the lab's host: outside the cluster
//	talk-lives PAUSE      all of them live, moved on since the last time, none waited longer than PAUSE, and each is
//	                      answered by the pod that answered it first
//	talk-leaves POD       from now on another pod may answer UDP that this one answered
//	talk-moved PAUSE      it answers no UDP any more, or not after PAUSE
func init() {
	commands["talk"] = cmdTalk
	commands["talk-lives"] = cmdTalkLives
	commands["talk-leaves"] = cmdTalkLeaves
	commands["talk-moved"] = cmdTalkMoved
}

// talk is a number of flows.
type talk struct {
	what    string
	udp     bool
	rounds  []atomic.Int64
	by      []atomic.Pointer[string] // who answered a flow last
	leaving atomic.Pointer[string]
	seen    []int64 // of rounds, at the last look
	longest atomic.Int64
	failed  atomic.Pointer[error]
	stopped atomic.Bool
	close   []func()
	done    sync.WaitGroup
}

const (
	// silence is when a connection is given up that nobody has closed.
	silence = 2 * time.Minute
	// datagramPatience is when a datagram is taken for lost, and sent again.
	datagramPatience = 200 * time.Millisecond
	// nameLength is the size of what goes to and fro: who answers.
	nameLength = 64
)

func cmdTalk(ts *testscript.TestScript, neg bool, args []string) {
	var udp bool
	var at, port string
	flags := flag.NewFlagSet("talk", flag.ContinueOnError)
	flags.BoolVar(&udp, "udp", false, "")
	flags.StringVar(&at, "at", "", "")
	flags.StringVar(&port, "port", "0", "")
	if err := flags.Parse(args); neg || err != nil || flags.NArg() != 3 {
		ts.Fatalf("usage: talk [-udp] [-at HOST:PORT -port PORT] FROM TO[,TO…] N")
	}
	n, err := strconv.Atoi(flags.Arg(2))
	ts.Check(err)
	t := &talk{what: strings.Join(args, " "), udp: udp, rounds: make([]atomic.Int64, n), by: make([]atomic.Pointer[string], n), seen: make([]int64, n)}
	s := sessionOf(ts)
	s.talks = append(s.talks, t)
	for name := range strings.SplitSeq(flags.Arg(1), ",") {
		to, address := podNamespace(ts, name)
		ts.Check(inside(to, func() error {
			listens, err := t.answer(net.JoinHostPort(address, port), name)
			if at == "" {
				at = listens
			}
			return err
		}))
	}
	begin := func() error {
		for i := range n {
			network := "tcp"
			if udp {
				network = "udp"
			}
			c, err := net.DialTimeout(network, at, 10*time.Second)
			if err != nil {
				return err
			}
			t.close = append(t.close, func() { c.Close() })
			t.done.Add(1)
			go t.converse(c, i)
		}
		return nil
	}
	if flags.Arg(0) == "-" {
		ts.Check(begin())
		return
	}
	from, _ := podNamespace(ts, flags.Arg(0))
	ts.Check(inside(from, begin))
}

// answer has a pod answer with its name, and returns where.
func (t *talk) answer(address, name string) (string, error) {
	answer := fmt.Appendf(nil, "%-*s", nameLength, name)
	if t.udp {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			return "", err
		}
		t.close = append(t.close, func() { c.Close() })
		go func() {
			for b := make([]byte, nameLength); ; {
				_, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = c.WriteTo(answer, from)
			}
		}()
		return c.LocalAddr().String(), nil
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return "", err
	}
	t.close = append(t.close, func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for b := make([]byte, nameLength); ; {
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					if _, err := c.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return listener.Addr().String(), nil
}

func (t *talk) converse(c net.Conn, i int) {
	defer t.done.Done()
	fail := func(err error) {
		if !t.stopped.Load() {
			t.failed.CompareAndSwap(nil, &err)
		}
	}
	question, answer := make([]byte, nameLength), make([]byte, nameLength)
	for !t.stopped.Load() {
		began := time.Now()
		err := ask(c, t.udp, question, answer)
		if err != nil {
			fail(err)
			return
		}
		who := strings.TrimSpace(string(answer))
		if before := t.by[i].Load(); before != nil && *before != who {
			if leaving := t.leaving.Load(); !t.udp || leaving == nil || *leaving != *before {
				fail(fmt.Errorf("%s answers what %s answered before", who, *before))
				return
			}
		}
		t.by[i].Store(&who)
		took := int64(time.Since(began))
		for longest := t.longest.Load(); took > longest && !t.longest.CompareAndSwap(longest, took); {
			longest = t.longest.Load()
		}
		t.rounds[i].Add(1)
		time.Sleep(20 * time.Millisecond)
	}
}

// ask sends the question and reads the answer; of UDP, as often as it takes.
func ask(c net.Conn, udp bool, question, answer []byte) error {
	end := time.Now().Add(silence)
	for {
		deadline := end
		if udp {
			deadline = time.Now().Add(datagramPatience)
		}
		_ = c.SetDeadline(deadline)
		_, err := c.Write(question)
		if err == nil {
			_, err = io.ReadFull(c, answer)
		}
		if err == nil || !udp || errors.Is(err, net.ErrClosed) || time.Now().After(end) {
			return err
		}
	}
}

func (t *talk) end() {
	if t.stopped.Swap(true) {
		return
	}
	for _, f := range t.close {
		f()
	}
	t.done.Wait()
}

func cmdTalkLives(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: talk-lives PAUSE")
	}
	pause := duration(ts, args[0])
	s := sessionOf(ts)
	for _, t := range s.talks {
		still := func() int {
			n := 0
			for i := range t.rounds {
				if t.rounds[i].Load() == t.seen[i] {
					n++
				}
			}
			return n
		}
		for began := time.Now(); still() > 0 && t.failed.Load() == nil && time.Since(began) < pause; {
			time.Sleep(20 * time.Millisecond)
		}
		if err := t.failed.Load(); err != nil {
			ts.Fatalf("talk %s: a flow is lost: %v", t.what, *err)
		}
		if n := still(); n > 0 {
			ts.Fatalf("talk %s: %d of %d flows are silent", t.what, n, len(t.rounds))
		}
		var rounds int64
		for i := range t.rounds {
			t.seen[i] = t.rounds[i].Load()
			rounds += t.seen[i]
		}
		longest := time.Duration(t.longest.Swap(0))
		ts.Logf("talk %s: %d flows, %d times there and back, the longest took %v", t.what, len(t.rounds), rounds, longest.Round(time.Microsecond))
		if longest > pause {
			ts.Fatalf("talk %s: a flow was silent for %v", t.what, longest)
		}
	}
}

func cmdTalkLeaves(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: talk-leaves POD")
	}
	for _, t := range sessionOf(ts).talks {
		n := t.answeredBy(args[0])
		t.leaving.Store(&args[0])
		ts.Logf("talk %s: %s answers %d flows", t.what, args[0], n)
	}
}

// answeredBy is how many flows a pod answered last.
func (t *talk) answeredBy(pod string) int {
	n := 0
	for i := range t.by {
		if who := t.by[i].Load(); who != nil && *who == pod {
			n++
		}
	}
	return n
}

func cmdTalkMoved(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: talk-moved PAUSE")
	}
	pause := duration(ts, args[0])
	began := time.Now()
	for _, t := range sessionOf(ts).talks {
		leaving := t.leaving.Load()
		if !t.udp || leaving == nil {
			continue
		}
		for t.answeredBy(*leaving) > 0 && time.Since(began) < pause {
			time.Sleep(20 * time.Millisecond)
		}
		if n := t.answeredBy(*leaving); n > 0 {
			ts.Fatalf("talk %s: %s still answers %d of %d flows", t.what, *leaving, n, len(t.by))
		}
	}
	ts.Logf("moved within %v", time.Since(began).Round(time.Millisecond))
}
