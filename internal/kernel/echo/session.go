package echo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Place is a namespace that probes come from and go to: a pod's, or the node's own.
type Place struct {
	Name      string       `json:"name"` // NAMESPACE/POD, or node/NAME
	Addresses []netip.Addr `json:"addresses"`
	Port      uint16       `json:"port"` // where its listener is
	Problem   string       `json:"problem,omitempty"`
	netns     string
}

// PlaceAt is a place whose namespace is at a path.
func PlaceAt(name, netns string, addresses []netip.Addr) Place {
	return Place{Name: name, Addresses: addresses, netns: netns}
}

// Request is a line of a session's input: probes to send.
type Request struct {
	Probes []Probe `json:"probes"`
}

// Response is a line of a session's output: first the places, then the results of each request.
type Response struct {
	Places  []Place  `json:"places,omitempty"`
	Results []Result `json:"results,omitempty"`
}

// Serve listens in all places, and then answers requests, a line of JSON each, until in ends.
func Serve(places []Place, in io.Reader, out io.Writer) error {
	namespaces := map[string]*link.Namespace{}
	for i := range places {
		p := &places[i]
		n, err := link.Open(p.netns)
		if err != nil {
			p.Problem = err.Error()
			continue
		}
		defer n.Close()
		l, err := Listen(n)
		if err != nil {
			p.Problem = err.Error()
			continue
		}
		defer l.Close()
		p.Port, namespaces[p.Name] = l.Port, n
	}
	enc, dec := json.NewEncoder(out), json.NewDecoder(in)
	if err := enc.Encode(Response{Places: places}); err != nil {
		return err
	}
	for {
		var r Request
		err := dec.Decode(&r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		if err := enc.Encode(Response{Results: Send(namespaces, r.Probes)}); err != nil {
			return err
		}
	}
}
