package etcdstate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// What was restored is what an etcd that starts with the directory holds, and can change.
func TestRestoreAndSave(t *testing.T) {
	var want State
	for i := range 1000 {
		want.KVs = append(want.KVs, KV{fmt.Appendf(nil, "/registry/%04d", i), bytes.Repeat([]byte{0, byte(i)}, i+1)})
	}
	in, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "etcd")
	config := embed.NewConfig()
	config.Name, config.Dir, config.LogLevel = "plane", dir, "panic"
	client := []url.URL{{Scheme: "unix", Host: "localhost:1"}}
	peer := []url.URL{{Scheme: "unix", Host: "localhost:2"}}
	t.Chdir(t.TempDir()) // the sockets are made there
	config.ListenClientUrls, config.AdvertiseClientUrls = client, client
	config.ListenPeerUrls, config.AdvertisePeerUrls = peer, peer
	config.InitialCluster = config.InitialClusterFromName("plane")
	args := []string{"restore", "--data-dir", dir, "--name", "plane", "--peer-url", peer[0].String(), "--initial-cluster", config.InitialCluster}
	if err := Main(args, bytes.NewReader(in), nil); err != nil {
		t.Fatal(err)
	}
	if err := Main(args, bytes.NewReader(in), nil); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("a directory that is there was written over: %v", err)
	}
	etcd, err := embed.StartEtcd(config)
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	select {
	case <-etcd.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("the etcd is not ready")
	}
	var out bytes.Buffer
	if err := Main([]string{"save", "--endpoint", client[0].String()}, nil, &out); err != nil {
		t.Fatal(err)
	}
	var got State
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%d keys came back of %d", len(got.KVs), len(want.KVs))
	}
}

func TestMisuse(t *testing.T) {
	for _, args := range [][]string{nil, {"copy"}, {"save", "--cacert", "/nowhere"}, {"restore"}, {"restore", "--data-dir", "x", "--name", "a"}} {
		if err := Main(args, strings.NewReader(`{"kvs": [}`), &bytes.Buffer{}); err == nil {
			t.Errorf("%v is no error", args)
		}
	}
}
