package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	clientcmdv1 "k8s.io/client-go/tools/clientcmd/api/v1"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/kubeconfig"
)

// Kubeconfig returns the kubeconfig of the lab: of one cluster, or of all if the name is empty.
func (l *Lab) Kubeconfig(cluster string) (*clientcmdapi.Config, error) {
	conf := clientcmdapi.NewConfig()
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if cluster != "" && c.Name != cluster {
			continue
		}
		if err := l.addContext(conf, c); err != nil {
			return nil, err
		}
		if conf.CurrentContext == "" {
			conf.CurrentContext = l.Context(c)
		}
	}
	if len(conf.Contexts) == 0 {
		_, err := l.Cluster(cluster)
		return nil, err
	}
	return conf, nil
}

func (l *Lab) addContext(conf *clientcmdapi.Config, c *topology.Cluster) error {
	admin, err := clientcmd.LoadFromFile(l.AdminKubeconfig(c))
	if err != nil {
		return fmt.Errorf("read the credentials of cluster %s: %w", c.Name, err)
	}
	from := admin.Contexts[admin.CurrentContext]
	if from == nil || admin.Clusters[from.Cluster] == nil || admin.AuthInfos[from.AuthInfo] == nil {
		return fmt.Errorf("read the credentials of cluster %s: %s has no current context", c.Name, l.AdminKubeconfig(c))
	}
	name := l.Context(c)
	conf.Clusters[name] = admin.Clusters[from.Cluster]
	conf.AuthInfos[name] = admin.AuthInfos[from.AuthInfo]
	conf.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name, Extensions: map[string]runtime.Object{
		kubeconfig.Mark: &runtime.Unknown{Raw: []byte(strconv.Quote(l.Name)), ContentType: runtime.ContentTypeJSON},
	}}
	// Where an entry was read from is not part of it.
	conf.Clusters[name].LocationOfOrigin, conf.AuthInfos[name].LocationOfOrigin = "", ""
	return nil
}

// kubeconfigEntries are the contexts, clusters and users of the lab, as the user's kubeconfig is to have them.
func (l *Lab) kubeconfigEntries() ([]kubeconfig.Entry, error) {
	conf, err := l.Kubeconfig("")
	if err != nil {
		return nil, err
	}
	var entries []kubeconfig.Entry
	for i := range l.Clusters {
		name := l.Context(&l.Clusters[i])
		var cluster clientcmdv1.Cluster
		var user clientcmdv1.AuthInfo
		err := errors.Join(
			clientcmdv1.Convert_api_Cluster_To_v1_Cluster(conf.Clusters[name], &cluster, nil),
			clientcmdv1.Convert_api_AuthInfo_To_v1_AuthInfo(conf.AuthInfos[name], &user, nil))
		e := kubeconfig.Entry{Name: name}
		if err == nil {
			e.Cluster, err = json.Marshal(cluster)
		}
		if err == nil {
			e.User, err = json.Marshal(user)
		}
		if err != nil {
			return nil, fmt.Errorf("read the credentials of %s: %w", name, err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// checkKubeconfig says early what mergeKubeconfig would fail at.
func (l *Lab) checkKubeconfig() error {
	var names []string
	for i := range l.Clusters {
		names = append(names, l.Context(&l.Clusters[i]))
	}
	return kubeconfig.Check(kubeconfig.Files(), l.Name, names)
}

// ErrContextTaken says that another lab has a cluster whose context has the same name: cluster c of lab a-b is a-b-c, as is b-c
// of a. Which of them kubectl meant would be a matter of luck.
var ErrContextTaken = errors.New("another lab has a cluster whose context has that name")

// checkContexts looks for the contexts of this lab among those of all others, running or not, whichever kubeconfig theirs
// are in. The names could be made such that no two are the same, but they are what people type.
func (l *Lab) checkContexts() error {
	all, err := openAll(l.Paths)
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Name == l.Name {
			continue
		}
		for i := range l.Clusters {
			for j := range other.Clusters {
				if context := l.Context(&l.Clusters[i]); context == other.Context(&other.Clusters[j]) {
					return fmt.Errorf("cluster %s of lab %s and cluster %s of lab %s would both have the context %s: %w; give the lab or the cluster another name",
						l.Clusters[i].Name, l.Name, other.Clusters[j].Name, other.Name, context, ErrContextTaken)
				}
			}
		}
	}
	return nil
}

// mergeKubeconfig puts the lab's contexts into the user's kubeconfig and makes the first the current one.
func (l *Lab) mergeKubeconfig() error {
	entries, err := l.kubeconfigEntries()
	if err != nil {
		return err
	}
	files := kubeconfig.Files()
	// Noted first: an up that ends in between has noted one too many, and none is forgotten.
	if err := l.noteKubeconfigs(append(l.notedKubeconfigs(), kubeconfig.Target(files))); err != nil {
		return err
	}
	return kubeconfig.Put(files, l.Name, entries)
}

// kubeconfigsFile lists the kubeconfigs that up has written to. down may run with another $KUBECONFIG, or under sudo.
const kubeconfigsFile = "kubeconfigs.json"

func (l *Lab) noteKubeconfigs(files []string) error {
	for i, file := range files {
		path, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		files[i] = path
	}
	slices.Sort(files)
	data, err := json.Marshal(slices.Compact(files))
	if err != nil {
		return err
	}
	return durable.WriteFile(l.dir(kubeconfigsFile), data, 0o600)
}

// notedKubeconfigs are the files that mergeKubeconfig has written to.
func (l *Lab) notedKubeconfigs() []string {
	var noted []string
	if data, err := os.ReadFile(l.dir(kubeconfigsFile)); err == nil {
		_ = json.Unmarshal(data, &noted) // damaged: there are still those that kubectl reads
	}
	return noted
}

// cleanKubeconfig takes the lab's contexts out of the kubeconfigs that up has written to, and of those that kubectl reads.
func (l *Lab) cleanKubeconfig(noted []string) error {
	var errs []error
	for _, file := range append(noted, kubeconfig.Files()...) {
		errs = append(errs, kubeconfig.Take(file, l.Name))
	}
	return errors.Join(errs...)
}
