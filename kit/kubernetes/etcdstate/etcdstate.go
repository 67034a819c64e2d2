// Package etcdstate reads all keys of a running etcd, and makes the data directory of a member that begins with given keys.
// A lab's template is the one, and a lab that begins with it the other.
//
// A copy of etcd's database would do for a lab that goes on as it was. A template's objects are changed on their way, which
// wants keys and values, and a new cluster has no use for the revisions that led to them.
package etcdstate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"
)

// State is what an etcd holds, in the form of `etcdctl get "" --prefix --write-out=json`: keys and values are in base64.
type State struct {
	KVs []KV `json:"kvs"`
}

// KV is a key with its value.
type KV struct {
	Key   []byte `json:"key"`
	Value []byte `json:"value"`
}

const usage = `kube etcd-state save --endpoint URL --cacert FILE --cert FILE --key FILE >STATE
       kube etcd-state restore --data-dir DIRECTORY --name NAME --peer-url URL --initial-cluster NAME=URL,... <STATE`

var errUsage = errors.New("usage: " + usage)

// Main saves the state of a running etcd, or restores it to the data directory of a member that does not exist yet.
func Main(args []string, in io.Reader, out io.Writer) error {
	if len(args) == 0 {
		return errUsage
	}
	flags := flag.NewFlagSet("kube etcd-state "+args[0], flag.ContinueOnError)
	switch args[0] {
	case "save":
		var s server
		flags.StringVar(&s.endpoint, "endpoint", "https://127.0.0.1:2379", "the etcd to read")
		flags.StringVar(&s.ca, "cacert", "", "the file of the authority that signed its certificate")
		flags.StringVar(&s.cert, "cert", "", "the file of the client's certificate")
		flags.StringVar(&s.key, "key", "", "the file of its key")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		state, err := s.read(context.Background())
		if err != nil {
			return fmt.Errorf("read the keys of the etcd at %s: %w", s.endpoint, err)
		}
		return json.NewEncoder(out).Encode(state)
	case "restore":
		var m Member
		flags.StringVar(&m.DataDir, "data-dir", "", "the data directory to make")
		flags.StringVar(&m.Name, "name", "", "the member's name")
		flags.StringVar(&m.PeerURL, "peer-url", "", "where the others find it")
		flags.StringVar(&m.InitialCluster, "initial-cluster", "", "all members: NAME=URL,...")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		var state State
		if err := json.NewDecoder(in).Decode(&state); err != nil {
			return fmt.Errorf("read the state to restore: %w", err)
		}
		if err := m.Restore(state); err != nil {
			return fmt.Errorf("make the data directory %s of etcd member %s: %w", m.DataDir, m.Name, err)
		}
		return nil
	}
	return errUsage
}

// readLimit is how long an etcd may take to tell all that it has.
const readLimit = 20 * time.Second

// server is a running etcd, and what a client shows it.
type server struct{ endpoint, ca, cert, key string }

// read returns all keys as they are at one revision.
func (s server) read(ctx context.Context) (State, error) {
	config := clientv3.Config{Endpoints: []string{s.endpoint}, Logger: zap.NewNop()}
	if s.ca != "" {
		pair, err := tls.LoadX509KeyPair(s.cert, s.key)
		if err != nil {
			return State{}, err
		}
		ca, err := os.ReadFile(s.ca)
		if err != nil {
			return State{}, err
		}
		config.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
		if !config.TLS.RootCAs.AppendCertsFromPEM(ca) {
			return State{}, fmt.Errorf("%s has no certificate", s.ca)
		}
	}
	client, err := clientv3.New(config)
	if err != nil {
		return State{}, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	all, err := client.Get(ctx, "", clientv3.WithPrefix())
	if err != nil {
		return State{}, err
	}
	var state State
	for _, kv := range all.Kvs {
		state.KVs = append(state.KVs, KV{kv.Key, kv.Value})
	}
	return state, nil
}

// Member is a member of an etcd cluster that has not begun yet.
type Member struct {
	DataDir        string // does not exist, or is empty
	Name           string
	PeerURL        string
	InitialCluster string // as etcd's flag of that name
}

// Restore makes the member's data directory, as `etcdutl snapshot restore` does, from a snapshot that is made here. Members with
// the same state agree on it: each key has one revision, given in the order of the state.
func (m Member) Restore(state State) error {
	if m.DataDir == "" {
		return errors.New("it has no name")
	}
	if err := os.MkdirAll(filepath.Dir(m.DataDir), 0o700); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Dir(m.DataDir), ".etcd-state-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	db := filepath.Join(dir, "db")
	if err := write(db, state); err != nil {
		return err
	}
	return snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath: db, SkipHashCheck: true, // the hash guards a file on its way, which this one has none of
		Name: m.Name, PeerURLs: []string{m.PeerURL}, InitialCluster: m.InitialCluster, InitialClusterToken: "etcd-cluster", // etcd's default
		OutputDataDir: m.DataDir, InitialMmapSize: backend.InitialMmapSize,
	})
}

// write makes a database with the state.
func write(path string, state State) error {
	config := backend.DefaultBackendConfig(zap.NewNop())
	config.Path, config.UnsafeNoFsync = path, true // what follows copies it
	b := backend.New(config)
	store := mvcc.NewStore(zap.NewNop(), b, &lease.FakeLessor{}, mvcc.StoreConfig{})
	for _, kv := range state.KVs {
		txn := store.Write(traceutil.TODO())
		txn.Put(kv.Key, kv.Value, lease.NoLease)
		txn.End()
	}
	store.Commit()
	return errors.Join(store.Close(), b.Close())
}
