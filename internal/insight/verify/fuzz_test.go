package verify_test

import (
	"encoding/json"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/testenv"
)

// What a node says of itself is compared whatever it is: the node may be somebody else's.
func FuzzState(f *testing.F) {
	c := cluster()
	whole, err := json.Marshal(state(f, c))
	testenv.Must(f, err)
	f.Add(whole)
	f.Add([]byte(`{"Leases":[{"Addresses":[""]}],"Pods":[{"Routes":["fe80::1%x"]}],"Kernel":{"Tunnel":{}},"Plan":{"Peers":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.Node
		if json.Unmarshal(data, &s) == nil {
			verify.Pods(c, "a", s)
		}
	})
}

func FuzzServices(f *testing.F) {
	c := cluster()
	whole, err := json.Marshal(answer.Services{})
	testenv.Must(f, err)
	f.Add(whole)
	f.Add([]byte(`{"Config":{"Mode":"auto"},"NFTables":{"Frontends":[{"Key":{"Addr":""}}]},"Connect":[{}],"Loopback":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.Services
		if json.Unmarshal(data, &s) == nil {
			verify.Services(c, "a", s)
		}
	})
}
