package echo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/fathom-network/fathom/internal/facts/ping"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Serve listens in all places, and then answers requests, a line of JSON each, until in ends.
func Serve(places []ping.Place, in io.Reader, out io.Writer) error {
	namespaces := map[string]*link.Namespace{}
	for i := range places {
		p := &places[i]
		n, err := link.Open(p.NetNS)
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
	if err := enc.Encode(ping.Response{Places: places}); err != nil {
		return err
	}
	for {
		var r ping.Request
		err := dec.Decode(&r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		if err := enc.Encode(ping.Response{Results: Send(namespaces, r.Probes)}); err != nil {
			return err
		}
	}
}
